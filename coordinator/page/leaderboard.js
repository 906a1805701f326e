// Who is credited with what: the first rows of the leaderboard, and the sums over all.

import { count, percent, setText } from "./figures.js";
import { table } from "./table.js";

export function leaderboard({ leaderboard: region, "leaderboard-empty": empty, "leaderboard-sums": sums }) {
  let all = 0;
  const show = table(region, [
    ["Rank", (_, index) => count(index + 1), "text"],
    ["Name", (row) => row.name, "text"],
    ["Samples", (row) => count(row.samples)],
    ["Share", (row) => all ? percent(row.samples / all) : "–"],
    ["Epochs", (row) => count(row.epochs)],
    ["Flagged", (row) => count(row.flagged)],
  ], "Name", (row) => row.peer_id);

  return (swarm) => {
    all = swarm.credited_samples;
    show(swarm.leaderboard);
    [empty.hidden, sums.hidden] = [swarm.leaderboard.length > 0, !swarm.leaderboard.length];
    setText(sums, `${count(all)} samples are credited in all. Flagged are epochs in which more was claimed than the ` +
      `others of the group saw, or in two groups at once: ${count(swarm.flagged_claims)} in all.`);
  };
}
