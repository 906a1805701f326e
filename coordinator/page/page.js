// The status page: who joins its parts.

import { charts } from "./charts.js";
import { count, duration, everybody, loss, setText, showTiles } from "./figures.js";
import { leaderboard } from "./leaderboard.js";
import { follow } from "./live.js";
import { peers } from "./peers.js";
import { showRounds } from "./rounds.js";

const HISTORY_SECONDS = 10; // at least, between two readings of the history
const ANNOUNCED_SECONDS = 10; // at least, between two epochs that a screen reader speaks of
const at = (id) => document.getElementById(id);
const parts = (...ids) => Object.fromEntries(ids.map((id) => [id, at(id)]));
const WORDS = { connecting: "Connecting", live: "Live", polled: "Every 10 s: many watch", offline: "Offline" };
const draw = charts(at("charts"), at("charts-missing"));
const showPeers = peers(parts("peers", "peers-empty", "peers-more"));
const showLeaderboard = leaderboard(parts("leaderboard", "leaderboard-empty", "leaderboard-sums"));
let newest, announced = 0, drawn = 0, state;

function announce(text) {
  setText(at("announcement"), text);
}

function show(swarm) {
  if (newest && swarm.epoch !== newest.epoch && Date.now() - announced > ANNOUNCED_SECONDS * 1000) {
    announced = Date.now();
    announce(`Epoch ${count(swarm.epoch)}, loss ${loss(swarm.loss)}, ${count(everybody(swarm))} peers`);
  }
  newest = swarm;
  showTiles(at("tiles"), swarm);
  showTrouble(swarm.archive?.last_error);
  showPeers(swarm);
  showLeaderboard(swarm);
  showRounds(parts("rounds", "refused", "churn", "rounds-empty", "since"), swarm);
  if (Date.now() - drawn > HISTORY_SECONDS * 1000) drawHistory();
}

function showTrouble(error) {
  at("archive-error").hidden = !error;
  setText(at("archive-error"), error ? `Checkpoints: ${error}` : "");
}

async function drawHistory() {
  drawn = Date.now();
  try {
    const answer = await fetch("/api/history", { signal: AbortSignal.timeout(10000) });
    if (answer.ok) draw(await answer.json(), newest);
  } catch { /* the connection's status tells; the next reading tries again */ }
}

function notice(connection, milliseconds) {
  if (connection === "offline") {
    return newest ? `The coordinator does not answer: these figures are ${duration(milliseconds / 1000)} old.`
      : "The coordinator does not answer.";
  }
  if (!newest || newest.fresh) return "";
  return newest.time_seconds ? "The coordinator could not read the DHT lately: these figures are old."
    : "The DHT has not been read yet.";
}

function status(connection, milliseconds) {
  const text = notice(connection, milliseconds);
  if (connection !== state && state !== "connecting" && state) {
    announce(connection === "offline" ? "The coordinator does not answer." : "The figures are live again.");
    drawn = 0; // what was missed is in the history
  }
  state = connection;
  at("connection").dataset.state = connection;
  setText(at("connection"), WORDS[connection]);
  setText(at("notice"), text);
  at("notice").hidden = !text;
}

at("copy").addEventListener("click", async () => {
  const [command, button] = [at("command"), at("copy")];
  getSelection().selectAllChildren(command);
  try {
    await navigator.clipboard.writeText(command.textContent); // undefined unless https or localhost
    setText(button, "Copied");
  } catch {
    setText(button, document.execCommand("copy") ? "Copied" : "Selected");
  }
  announce(`Command ${button.textContent.toLowerCase()}`);
});

follow(show, status);
