// What was counted since the coordinator first looked: rounds, what was refused in them, who came and went.

import { count, setText, tile } from "./figures.js";
import { local } from "./gist.js";

export function showRounds({ rounds: list, "rounds-empty": empty, "rounds-since": since }, swarm) {
  const { rounds: { averaged, failed, alone }, refused, departures } = swarm;
  empty.hidden = averaged + failed + alone > 0;
  tile(list, "Averaged", count(averaged), "rounds with others");
  tile(list, "Failed", count(failed), "rounds given up");
  tile(list, "Alone", count(alone), "nobody else was there");
  tile(list, "Joined", count(swarm.joins), "peers that came, or came back");
  tile(list, "Left", count(departures.left), "peers that said so");
  tile(list, "Lost", count(departures.lost), "peers that fell silent");
  tile(list, "Bad values", count(refused.value), "refused: not finite, or misshapen");
  tile(list, "Gone or late", count(refused.absent), "refused: their senders vanished");
  tile(list, "Bad messages", count(refused.message), "refused: forged, or out of place");
  setText(since, swarm.since_seconds ? `Since ${local(swarm.since_seconds).slice(0, -3)}. ` : "");
}
