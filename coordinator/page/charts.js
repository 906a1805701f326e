// Charts of the history, by plotly.js. Each has its gist in words; where the library fails to load, the words stay.

import { count, loss, make, rate, setText } from "./figures.js";

const BARS = 40;
const CHARTS = [
  { id: "loss", title: "Loss over epochs", empty: "No epoch has ended yet: the loss is known after the first.",
    series: "over_epochs", axis: "epoch", lines: [["loss", "Loss", "accent", loss]], range: "normal" },
  { id: "speed", title: "Samples per second", empty: "No reading of the swarm yet.",
    series: "over_time", axis: "time", lines: [["samples_per_second", "Samples/s", "accent", rate]] },
  { id: "peers", title: "Peers and group size", empty: "No reading of the swarm yet.", series: "over_time",
    axis: "time", lines: [["peers", "Peers", "accent", count], ["group_size", "Group size", "second", count]],
    target: true },
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

const place = (chart, key) => chart.axis === "epoch" ? `epoch ${count(key)}` : local(key);

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
  for (let i = 1; i < time.length; i++) {
    grown[Math.min(BARS - 1, Math.floor((time[i] - start) / span))] += values[i] - values[i - 1];
  }
  return grown.map((value, bar) => [start + (bar + 0.5) * span, value]);
}

function gist(chart, [field, name, , format], history) {
  const known = points(chart, history, field).filter(([, value]) => value !== null);
  if (!known.length) return "";
  const extreme = (better) => known.reduce((best, point) => better(point[1], best[1]) ? point : best);
  const say = (word, [key, value]) => `${word} ${format(value)} at ${place(chart, key)}`;
  return `${name}: ${[say("first", known[0]), say("lowest", extreme((a, b) => a < b)),
    say("highest", extreme((a, b) => a > b)), say("now", known[known.length - 1])].join("; ")}.`;
}

function inWords(chart, history) {
  if (chart.lines) return chart.lines.map((line) => gist(chart, line, history)).filter(Boolean).join(" ");
  const { time } = history.over_time;
  const sums = chart.bars.map(([field, name]) =>
    `${count(growth(history, field).reduce((sum, [, value]) => sum + value, 0))} ${name.toLowerCase()}`);
  return time.length && chart.bars.some(([field]) => history.over_time[field].at(-1) > 0)
    ? `${sums.join(", ")} since ${local(time[0])}.` : "";
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function traces(chart, history, target) {
  const xy = (found) => ({ x: found.map(([key]) => chart.axis === "time" ? local(key) : key),
    y: found.map(([, value]) => value) });
  if (chart.bars) {
    return chart.bars.map(([field, name, ink]) =>
      ({ ...xy(growth(history, field)), name, type: "bar", marker: { color: colour(ink) } }));
  }
  const dashes = ["solid", "dash"];
  const lines = chart.lines.map(([field, name, ink], index) => ({ ...xy(points(chart, history, field)), name,
    type: "scatter", mode: chart.axis === "epoch" ? "lines+markers" : "lines", marker: { size: 4 },
    line: { color: colour(ink), width: 2, dash: dashes[index] } }));
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
    showlegend: (chart.lines ?? chart.bars).length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    barmode: "stack", bargap: 0.15, dragmode: false, hovermode: "x unified", uirevision: "kept",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...axis, type: chart.axis === "time" ? "date" : "linear", nticks: 6 },
    yaxis: { ...axis, rangemode: chart.range ?? "tozero", nticks: 6 } };
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
      if (!drawing.hidden) {
        globalThis.Plotly.react(drawing, traces(chart, history, target), layout(chart),
          { displayModeBar: false, responsive: true });
      }
    }
  };

  const script = make("script", { src: "/static/plotly.min.js", async: true });
  script.onload = () => { loaded = "Plotly" in globalThis; missing.hidden = loaded; if (last) draw(...last); };
  script.onerror = () => { missing.hidden = false; };
  document.head.append(script);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (last) draw(...last); });
  return draw;
}
