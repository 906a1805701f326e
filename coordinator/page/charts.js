// Charts of the history, by plotly.js. Each has its gist in words; where the library fails to load, the words stay.

import { count, loss, make, rate, setText } from "./figures.js";

const BARS = 40;
const FEW = 40; // points that are shown as such; more are a line
const CHARTS = [
  { id: "loss", title: "Loss over epochs", empty: "No epoch has ended yet: the loss is known after the first.",
    series: "over_epochs", axis: "epoch", lines: [["loss", "Loss", "accent", loss]] },
  { id: "speed", title: "Samples per second", empty: "Nobody has trained yet.", amounts: true,
    series: "over_time", axis: "time", lines: [["samples_per_second", "Samples/s", "accent", rate]] },
  { id: "peers", title: "Peers and group size", empty: "No peer has been here yet.", amounts: true,
    series: "over_time", axis: "time", target: true,
    lines: [["peers", "Peers", "accent", count], ["group_size", "Group size", "second", count]] },
  { id: "rounds", title: "Rounds by outcome", empty: "No round of averaging has ended yet.",
    series: "over_time", axis: "time", bars: [["averaged", "Averaged", "accent"], ["failed", "Failed", "second"],
      ["alone", "Alone", "third"]] },
];

const two = (value) => String(value).padStart(2, "0");

// Local time as plotly.js reads it: a date without a zone.
function local(seconds) {
  const at = new Date(seconds * 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ` +
    `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

const place = (chart, key) => chart.axis === "epoch" ? `epoch ${count(key)}` : local(key).slice(0, -3);

// Points of a line, with a hole where the coordinator read nothing for much longer than the points are apart.
function points(chart, history, field) {
  const { width, [chart.axis]: keys, [field]: values } = history[chart.series];
  const found = [];
  keys.forEach((key, index) => {
    const hole = chart.axis === "time" && index && key - keys[index - 1] > 3 * width + 10;
    if (hole) found.push([keys[index - 1] + width, null]);
    found.push([key, values[index]]);
  });
  return found;
}

// How much each counter grew in BARS equal spans of time: [middle, growth].
function growth(history, field) {
  const { time, [field]: values } = history.over_time;
  const [start, span] = [time[0], Math.max(1, (time[time.length - 1] - time[0]) / BARS)];
  const grown = new Array(BARS).fill(0);
  time.forEach((at, index) => {
    grown[Math.min(BARS - 1, Math.floor((at - start) / span))] += values[index] - (values[index - 1] ?? 0);
  });
  return grown.map((value, bar) => [start + (bar + 0.5) * span, value]);
}

function gist(chart, [field, name, , format], history) {
  const known = points(chart, history, field).filter(([, value]) => value !== null);
  if (!known.length) return "";
  const extreme = (better) => known.reduce((best, point) => better(point[1], best[1]) ? point : best);
  const [low, high, now] = [extreme((a, b) => a < b), extreme((a, b) => a > b), known[known.length - 1]];
  if (low[1] === high[1]) return `${name}: ${format(now[1])} throughout.`;
  const say = (word, [key, value]) => `${word} ${format(value)} (${place(chart, key)})`;
  return `${name}: now ${format(now[1])}, ${say("lowest", low)}, ${say("highest", high)}.`;
}

function inWords(chart, history) {
  const some = (chart.lines ?? chart.bars).some(([field]) => history[chart.series][field].some((value) => value > 0));
  if ((chart.amounts || chart.bars) && !some) return "";
  if (chart.lines) return chart.lines.map((line) => gist(chart, line, history)).filter(Boolean).join(" ");
  const sums = chart.bars.map(([field, name]) => `${count(history.over_time[field].at(-1))} ${name.toLowerCase()}`);
  return `${sums.join(", ")} since the coordinator started.`;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function traces(chart, history, target) {
  const xy = (found) => ({ x: found.map(([key]) => chart.axis === "time" ? local(key) : key),
    y: found.map(([, value]) => value) });
  if (chart.bars) {
    return chart.bars.map(([field, name, ink]) =>
      ({ ...xy(growth(history, field)), name, type: "bar", marker: { color: colour(ink) } }));
  }
  const lines = chart.lines.map(([field, name, ink], index) => ({ ...xy(points(chart, history, field)), name,
    type: "scatter", mode: history[chart.series].time.length < FEW ? "lines+markers" : "lines", marker: { size: 5 },
    line: { color: colour(ink), width: index ? 1.2 : 2.2 } }));
  const { [chart.axis]: keys } = history[chart.series];
  const goal = { ...xy([[keys[0], target], [keys[keys.length - 1], target]]), name: "Group target", type: "scatter",
    mode: "lines", line: { color: colour("third"), width: 1, dash: "dot" } };
  return chart.target ? [...lines, goal] : lines;
}

function layout(chart) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: true,
    automargin: true };
  return { autosize: true, margin: { l: 44, r: 8, t: 8, b: 28 }, paper_bgcolor: "transparent",
    plot_bgcolor: "transparent", font: { color: colour("ink"), size: 12, family: "system-ui, sans-serif" },
    showlegend: (chart.lines ?? chart.bars).length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    barmode: "stack", bargap: 0.15, dragmode: false, hovermode: "x unified", uirevision: "kept",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...axis, type: chart.axis === "time" ? "date" : "linear", nticks: 5, tickangle: 0 },
    yaxis: { ...axis, rangemode: chart.amounts || chart.bars ? "tozero" : "normal", nticks: 6 } };
}

function figure(chart) {
  const [words, drawing] = [make("figcaption", { id: `${chart.id}-words` }),
    make("div", { className: "chart", role: "img", ariaLabel: chart.title })];
  drawing.setAttribute("aria-describedby", words.id);
  const whole = make("figure", { id: `chart-${chart.id}` }, make("h3", { textContent: chart.title }), drawing, words);
  return { whole, words, drawing };
}

// Draws into `container`: returns draw(history, target group size). `missing` is shown if the library does not load.
export function charts(container, missing) {
  const figures = CHARTS.map((chart) => ({ chart, ...figure(chart) }));
  container.append(...figures.map(({ whole }) => whole));
  let last, loaded = false;

  const draw = (history, target) => {
    last = [history, target];
    for (const { chart, words, drawing } of figures) {
      const said = inWords(chart, history);
      setText(words, said || chart.empty);
      drawing.hidden = !said || !loaded;
      if (drawing.hidden) continue;
      globalThis.Plotly.react(drawing, traces(chart, history, target), layout(chart),
        { displayModeBar: false, responsive: true });
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
