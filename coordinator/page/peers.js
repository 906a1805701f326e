// The table of peers: a row for each, kept while it is here.

import { count, duration, loss, make, rate, setText, span } from "./figures.js";

const MOST_ROWS = 300; // more would make a phone slow; the JSON has all
const refusedBy = ({ refused: { value, absent, message } }) => value + absent + message;
const COLUMNS = [
  ["Name", (peer) => peer.name, "text"],
  ["State", (peer) => peer.state, "text"],
  ["Epoch", (peer) => count(peer.epoch)],
  ["Samples", (peer) => count(peer.samples_accumulated)],
  ["Samples/s", (peer) => rate(peer.samples_per_second)],
  ["Loss", (peer) => loss(peer.loss)],
  ["Group", (peer) => count(peer.group_size)],
  ["Round", (peer) => peer.round_seconds ? span(peer.round_seconds) : "–"],
  ["Refused", (peer) => count(refusedBy(peer))],
  ["Last seen", (peer) => `${duration(peer.last_seen_seconds)} ago`],
  ["Device", (peer) => peer.device, "text"],
  ["Version", (peer) => peer.version, "text"],
  ["Mode", (peer) => peer.mode, "text"],
];
const rows = new Map(); // by peer id

function newRow(peer) {
  const cells = COLUMNS.map(([, , kind = ""], index) => index === 0
    ? make("th", { scope: "row", className: kind, title: peer.peer_id }) : make("td", { className: kind }));
  return make("tr", {}, ...cells);
}

export function showPeers(region, empty, more, swarm) {
  const [heads, body] = [region.querySelector("thead tr"), region.querySelector("tbody")];
  if (!heads.children.length) {
    heads.append(...COLUMNS.map(([title, , kind = ""]) =>
      make("th", { scope: "col", className: kind, textContent: title })));
  }
  const order = (peer) => `${peer.name}\n${peer.peer_id}`;
  const shown = [...swarm.peers].sort((a, b) => order(a) < order(b) ? -1 : 1).slice(0, MOST_ROWS);
  const here = new Set(shown.map((peer) => peer.peer_id));
  for (const [id, row] of rows) if (!here.has(id)) { row.remove(); rows.delete(id); }
  shown.forEach((peer, index) => {
    if (!rows.has(peer.peer_id)) rows.set(peer.peer_id, newRow(peer));
    const row = rows.get(peer.peer_id);
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
    COLUMNS.forEach(([, cell], column) => setText(row.children[column], cell(peer)));
  });
  [region.hidden, empty.hidden] = [!shown.length, shown.length > 0];
  more.hidden = swarm.peers.length <= MOST_ROWS;
  setText(more, `The first ${MOST_ROWS} of ${count(swarm.peers.length)}; the JSON has all.`);
}
