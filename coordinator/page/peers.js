// The table of peers, by name.

import { count, duration, everybody, loss, rate, setText, span } from "./figures.js";
import { table } from "./table.js";

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

export function peers({ peers: region, "peers-empty": empty, "peers-more": more }) {
  const show = table(region, COLUMNS, "Name", (peer) => peer.peer_id);
  const order = (peer) => `${peer.name}\n${peer.peer_id}`;
  return (swarm) => {
    show([...swarm.peers].sort((a, b) => order(a) < order(b) ? -1 : 1).slice(0, MOST_ROWS));
    empty.hidden = swarm.peers.length > 0;
    more.hidden = everybody(swarm) <= MOST_ROWS;
    setText(more, `The first ${MOST_ROWS} of ${count(everybody(swarm))}; the JSON has all.`);
  };
}
