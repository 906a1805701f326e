// What a chart draws, as points, and what it says in words.

import { count } from "./figures.js";

const BARS = 40;

const two = (value) => String(value).padStart(2, "0");

// Local time as plotly.js reads it: a date without a zone.
export function local(seconds) {
  const at = new Date(seconds * 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ` +
    `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

const place = (chart, key) => chart.axis === "epoch" ? `epoch ${count(key)}` : local(key).slice(0, -3);

// Between two readings whose points have buckets of that width.
const isHole = (width, early, late) => late - early > 3 * width + 10;

// Points of a line, with a hole where the coordinator read nothing for much longer than the points are apart.
export function points(chart, history, field) {
  const { width, [chart.axis]: keys, [field]: values } = history[chart.series];
  const found = [];
  keys.forEach((key, index) => {
    const hole = chart.axis === "time" && index && isHole(width, keys[index - 1], key);
    if (hole) found.push([keys[index - 1] + width, null]);
    found.push([key, values[index]]);
  });
  return found;
}

// How much each counter grew in BARS equal spans of time: [middle, growth]. What it grew by while the coordinator did
// not look is spread over that time: when it was, nobody knows.
export function growth(history, field) {
  const { width, time, [field]: values } = history.over_time;
  const [start, span] = [time[0], Math.max(1, (time[time.length - 1] - time[0]) / BARS)];
  const bar = (at) => Math.min(BARS - 1, Math.floor((at - start) / span));
  const grown = new Array(BARS).fill(0);
  time.forEach((at, index) => {
    const [amount, last] = [values[index] - (values[index - 1] ?? 0), bar(at)];
    const first = index && isHole(width, time[index - 1], at) ? bar(time[index - 1]) : last;
    for (let n = first; n <= last; n += 1) {
      const share = (k) => Math.round(amount * k / (last - first + 1));
      grown[n] += share(n - first + 1) - share(n - first);
    }
  });
  return grown.map((value, n) => [start + (n + 0.5) * span, value]);
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

// The archive's evaluations as one more series of the history: a list for each figure, null where it was not measured.
export function evaluations(archive) {
  const all = archive?.evaluations ?? [];
  const list = (name) => all.map(({ figures }) => figures[name] ?? null);
  return { width: 1, epoch: all.map(({ epoch }) => epoch), ...Object.fromEntries(
    ["knn_accuracy", "top1_accuracy", "top5_accuracy", "val_loss"].map((name) => [name, list(name)])) };
}

export function inWords(chart, history) {
  const some = (chart.lines ?? chart.bars).some(([field]) => history[chart.series][field].some((value) => value > 0));
  if ((chart.amounts || chart.bars) && !some) return "";
  if (chart.lines) {
    return [...chart.lines, ...chart.said ?? []].map((line) => gist(chart, line, history)).filter(Boolean).join(" ");
  }
  const sums = chart.bars.map(([field, name]) => `${name.toLowerCase()} ${count(history.over_time[field].at(-1))}`);
  return `All told: ${sums.join(", ")}.`;
}
