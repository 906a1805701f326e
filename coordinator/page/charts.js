// Charts of the history, by plotly.js. Each has its gist in words; where the library fails to load, the words stay.

import { CHARTS } from "./chart_list.js";
import { make, setText } from "./figures.js";
import { evaluations, growth, inWords, local, points } from "./gist.js";

const FEW = 40; // points that are shown as such; more are a line

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function traces(chart, history, target) {
  const xy = (found) => ({ x: found.map(([key]) => chart.axis === "time" ? local(key) : key),
    y: found.map(([, value]) => value) });
  if (chart.bars) {
    return chart.bars.map(([field, name, ink]) =>
      ({ ...xy(growth(history, field)), name, type: "bar", marker: { color: colour(ink) } }));
  }
  const { [chart.axis]: keys, ...values } = history[chart.series];
  const known = chart.lines.filter(([field]) => values[field].some((value) => value !== null));
  const lines = known.map(([field, name, ink], index) => ({ ...xy(points(chart, history, field)), name,
    type: "scatter", mode: keys.length < FEW ? "lines+markers" : "lines", marker: { size: 5 },
    line: { color: colour(ink), width: index ? 1.2 : 2.2 } }));
  const goal = { ...xy([[keys[0], target], [keys[keys.length - 1], target]]), name: "Group target", type: "scatter",
    mode: "lines", line: { color: colour("third"), width: 1, dash: "dot" } };
  return chart.target ? [...lines, goal] : lines;
}

function layout(chart, drawn) {
  const most = Math.max(...drawn.flatMap(({ y }) => y).filter((value) => value !== null));
  const dtick = (chart.whole || chart.bars) && most < 6 ? 1 : null; // no half peers
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: true,
    automargin: true };
  return { autosize: true, margin: { l: 44, r: 8, t: 8, b: 28 }, paper_bgcolor: "transparent",
    plot_bgcolor: "transparent", font: { color: colour("ink"), size: 12, family: "system-ui, sans-serif" },
    showlegend: drawn.length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    barmode: "stack", bargap: 0.15, dragmode: false, hovermode: "x unified", uirevision: "kept",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...axis, type: chart.axis === "time" ? "date" : "linear", nticks: 5, tickangle: 0 },
    yaxis: { ...axis, rangemode: chart.amounts || chart.bars ? "tozero" : "normal", nticks: 6, dtick,
      tickformat: chart.ticks ?? "" } };
}

function figure(chart) {
  const [words, drawing] = [make("figcaption", { id: `${chart.id}-words` }),
    make("div", { className: chart.bars ? "chart keyed" : "chart", role: "img", ariaLabel: chart.title })];
  drawing.setAttribute("aria-describedby", words.id);
  const whole = make("figure", { id: `chart-${chart.id}` }, make("h3", { textContent: chart.title }), drawing, words);
  return { whole, words, drawing };
}

// Draws into `container`: returns draw(history, swarm), where the swarm is a reading. `missing` is shown if the library
// does not load.
export function charts(container, missing) {
  const figures = CHARTS.map((chart) => ({ chart, ...figure(chart) }));
  container.append(...figures.map(({ whole }) => whole));
  let last, loaded = false;

  const draw = (past, swarm) => {
    last = [past, swarm];
    const history = { ...past, evaluations: evaluations(swarm.archive) };
    for (const { chart, whole, words, drawing } of figures) {
      const said = inWords(chart, history);
      setText(words, said || (typeof chart.empty === "function" ? chart.empty(swarm) : chart.empty));
      drawing.hidden = !said || !loaded;
      whole.classList.toggle("empty", !said); // after those that have something to show
      if (drawing.hidden) continue;
      const drawn = traces(chart, history, swarm.target_group_size);
      globalThis.Plotly.react(drawing, drawn, layout(chart, drawn), { displayModeBar: false, responsive: true });
    }
    // To a screen reader a chart is its name and its words; one is where plotly.js measures, unseen.
    document.querySelectorAll("#charts svg, svg#js-plotly-tester").forEach((svg) => { svg.ariaHidden = "true"; });
  };

  const library = document.getElementById("plotly"); // deferred, and after us: it has neither loaded nor failed yet
  library.onload = () => { loaded = "Plotly" in globalThis; missing.hidden = loaded; if (last) draw(...last); };
  library.onerror = () => { missing.hidden = false; };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (last) draw(...last); });
  return draw;
}
