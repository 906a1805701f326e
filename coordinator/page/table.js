// Tables whose rows are kept while what they are of is here, so that a reader keeps their place and selection.

import { make, setText } from "./figures.js";

// Of a `region` around a table: returns show(items). `columns`: [title, cell(item, index), "text" if it is no number];
// the one titled `head` names the row. `key(item)` tells items apart, and is the tip of the row's name.
export function table(region, columns, head, key) {
  const [heads, body, rows] = [region.querySelector("thead tr"), region.querySelector("tbody"), new Map()];
  heads.append(...columns.map(([title, , kind = ""]) =>
    make("th", { scope: "col", className: kind, textContent: title })));

  const newRow = (item) => make("tr", {}, ...columns.map(([title, , kind = ""]) => title === head
    ? make("th", { scope: "row", className: kind, title: key(item) }) : make("td", { className: kind })));

  return (items) => {
    const here = new Set(items.map(key));
    for (const [id, row] of rows) if (!here.has(id)) { row.remove(); rows.delete(id); }
    items.forEach((item, index) => {
      const id = key(item);
      if (!rows.has(id)) rows.set(id, newRow(item));
      const row = rows.get(id);
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
      columns.forEach(([, cell], column) => setText(row.children[column], cell(item, index)));
    });
    region.hidden = !items.length;
  };
}
