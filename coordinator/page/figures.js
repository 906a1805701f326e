// The figures of one reading. All that is shown is set as text: what volunteers sign is never markup.

export const count = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 });
export const rate = (value) =>
  value.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
export const loss = (value) => value === null ? "–" : value.toFixed(4);
export const percent = (value) => `${(100 * value).toFixed(1)}%`;

export function duration(seconds) {
  const [s, m, h] = [Math.round(seconds), Math.round(seconds / 60), Math.round(seconds / 3600)];
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (m < 1440) return `${Math.floor(m / 60)} h ${m % 60} min`;
  return `${count(Math.floor(h / 24))} d ${h % 24} h`;
}

// Of what may take a moment only.
export const span = (seconds) =>
  seconds === null ? "–" : seconds < 0.95 ? `${Math.round(1000 * seconds)} ms`
    : seconds < 9.95 ? `${seconds.toFixed(1)} s` : duration(seconds);

// An element made once; later calls change only its text, so that a reader keeps their place and selection.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function tile(list, name, value, note = "") {
  let box = [...list.children].find((child) => child.dataset.name === name);
  if (!box) {
    box = make("div", {}, make("dt", { textContent: name }), make("dd", { className: "value" }),
      make("dd", { className: "note" }));
    box.dataset.name = name;
    list.append(box);
  }
  setText(box.children[1], value);
  setText(box.children[2], note);
  box.children[2].hidden = !note;
  return box;
}

// Of all peers, while swarm.peers may be the first of them only.
export const everybody = (swarm) => Object.values(swarm.peer_states).reduce((sum, number) => sum + number, 0);
const present = (swarm) => everybody(swarm) - (swarm.peer_states.leaving ?? 0);

// [how long until it, what is gathered for it].
function toNextEpoch(swarm) {
  const gathered = `${count(swarm.epoch_samples)} of ${count(swarm.target_batch_size)} samples`;
  if (!present(swarm)) return ["–", "no peer is here"];
  if (swarm.seconds_to_next_epoch === null) return ["–", `nobody trains yet; ${gathered}`];
  return [swarm.seconds_to_next_epoch === 0 ? "averaging" : `in ${duration(swarm.seconds_to_next_epoch)}`, gathered];
}

// [how old it is, which it is].
function newestCheckpoint({ archive, time_seconds: now }) {
  if (!archive) return ["–", "none is kept here"];
  if (archive.epoch === null) return ["–", "there is none yet"];
  return [duration(Math.max(0, now - archive.time_seconds)), `epoch ${count(archive.epoch)}`];
}

export function showTiles(list, swarm) {
  const { epoch_samples: samples, target_batch_size: target } = swarm;
  tile(list, "Epoch", count(swarm.epoch), "updates of the model");
  const next = tile(list, "Next epoch", ...toNextEpoch(swarm));
  const bar = next.querySelector("progress") ??
    next.appendChild(make("dd")).appendChild(make("progress", { ariaLabel: "Samples towards the next epoch" }));
  Object.assign(bar, { max: target, value: Math.min(samples, target) });
  tile(list, "Loss", loss(swarm.loss), swarm.loss === null ? "known after the first epoch" : "mean over peers");
  tile(list, "Samples/s", rate(swarm.samples_per_second), `${count(swarm.samples_total)} so far`);
  tile(list, "Peers", count(everybody(swarm)), kinds(swarm.peer_states) || "none yet");
  tile(list, "Group size", count(swarm.group_size),
    swarm.group_size ? `of at most ${count(swarm.target_group_size)}` : "known after the first round");
  tile(list, "Round duration", span(swarm.round_seconds),
    swarm.round_seconds === null ? "known after the first round" : "median of the peers' last");
  tile(list, "Checkpoint's age", ...newestCheckpoint(swarm));
  if (swarm.consensus_distance !== null) {
    tile(list, "Consensus distance", swarm.consensus_distance.toPrecision(3), "between peers' parameters");
  }
  [...list.children].filter((box) => box.dataset.name === "Consensus distance")
    .forEach((box) => { box.hidden = swarm.consensus_distance === null; });
}

function kinds(states) {
  return ["training", "starting", "leaving"].map((state) => [states[state], state])
    .filter(([number]) => number).map(([number, state]) => `${count(number)} ${state}`).join(", ");
}
