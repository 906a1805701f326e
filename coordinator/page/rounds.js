// What was counted since the coordinator first looked: rounds, what was refused in them, who came and went.

import { count, setText, tile } from "./figures.js";
import { local } from "./gist.js";

export function showRounds({ rounds, refused, churn, "rounds-empty": empty, since }, swarm) {
  const { averaged, failed, alone } = swarm.rounds;
  empty.hidden = averaged + failed + alone > 0;
  tile(rounds, "Averaged", count(averaged), "with others");
  tile(rounds, "Failed", count(failed), "given up");
  tile(rounds, "Alone", count(alone), "nobody else was there");
  tile(refused, "Values", count(swarm.refused.value), "not finite, or misshapen");
  tile(refused, "Absent", count(swarm.refused.absent), "sender gone, or late");
  tile(refused, "Messages", count(swarm.refused.message), "forged, or out of place");
  tile(churn, "Joined", count(swarm.joins), "came, or came back");
  tile(churn, "Left", count(swarm.departures.left), "said so");
  tile(churn, "Lost", count(swarm.departures.lost), "fell silent");
  setText(since, swarm.since_seconds ? `Since ${local(swarm.since_seconds).slice(0, -3)}. ` : "");
}
