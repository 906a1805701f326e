// What is charted: of which series of the history, along which axis, and what is said while there is nothing to draw.

import { count, loss, percent, rate, span } from "./figures.js";

const notEvaluated = ({ archive }) => archive
  ? "No checkpoint has been evaluated yet. The coordinator does it if it is started with --data DIR, or with " +
    "--evaluate where the experiment makes its own images."
  : "This coordinator keeps no checkpoints that it could evaluate: it runs with --archive-every-epochs 0.";

// `lines` and `bars`: [field of the history, its name, ink, format]. Bars are of counters: what they grew by.
// `whole`: of lines whose values are integers, as bars' are.
// `amounts`: 0 is the least there can be, and means that nothing is there yet. `target`: a line for the group's.
// `said`: in words only. `empty` may be a function of the reading.
export const CHARTS = [
  { id: "loss", title: "Loss over epochs", empty: "No epoch has ended yet: the loss is known after the first.",
    series: "over_epochs", axis: "epoch", lines: [["loss", "Loss", "accent", loss]] },
  { id: "evaluation", title: "Evaluation over epochs", empty: notEvaluated,
    series: "evaluations", axis: "epoch", ticks: ".0%", lines: [["knn_accuracy", "k-NN accuracy", "accent", percent],
      ["top1_accuracy", "Top-1 accuracy", "accent", percent], ["top5_accuracy", "Top-5 accuracy", "second", percent]],
    said: [["val_loss", "Loss on the validation images", "third", loss]] },
  { id: "speed", title: "Samples per second", empty: "Nobody has trained yet.", amounts: true,
    series: "over_time", axis: "time", lines: [["samples_per_second", "Samples/s", "accent", rate]] },
  { id: "peers", title: "Peers", empty: "No peer has been here yet.", amounts: true, whole: true,
    series: "over_time", axis: "time", lines: [["peers", "Peers", "accent", count]] },
  { id: "group", title: "Group size against its target", empty: "No group has averaged yet.", amounts: true,
    series: "over_time", axis: "time", whole: true, target: true,
    lines: [["group_size", "Largest group", "accent", count]] },
  { id: "rounds", title: "Rounds by outcome", empty: "No round of averaging has ended yet.",
    series: "over_time", axis: "time", bars: [["averaged", "Averaged", "accent"], ["failed", "Failed", "second"],
      ["alone", "Alone", "third"]] },
  { id: "duration", title: "Duration of rounds, in seconds", empty: "No round with others has ended yet.",
    series: "over_time", axis: "time", amounts: true,
    lines: [["round_seconds", "Median of the peers' last", "accent", span]] },
  { id: "refused", title: "Contributions refused", empty: "None so far: nothing bad was sent, and nobody missing.",
    series: "over_time", axis: "time", bars: [["refused_value", "Values", "second"],
      ["refused_absent", "Absent", "third"], ["refused_message", "Messages", "accent"]] },
];
