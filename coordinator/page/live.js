// The swarm's newest reading, by server-sent events, and right again after an outage of any kind.

const PATIENCE = 5000; // milliseconds without a reading, after which the figures are called old
const HALF_OPEN = 10000; // a connection silent for that long is dead, though nobody said so
const POLLED = 10000; // between two readings when the coordinator has no place for another live viewer

// A reading as /api/swarm has it, of an event: this has all rows, or those that changed since the one before.
function whole(event, rows) {
  for (const id of event.peers ? [...rows.keys()] : event.gone) rows.delete(id);
  for (const row of event.peers ?? event.changed) rows.set(row.peer_id, row);
  const peers = [...rows.values()].map((row) => ({ ...row, last_seen_seconds: event.time_seconds - row.heard_seconds }));
  return { ...event, peers };
}

// Calls show(swarm) at every reading, and each second status(state, milliseconds since the last), of which the state is
// "connecting", "live", "polled" or "offline".
// Only while the page is seen: who comes back to it gets a reading at once.
export function follow(show, status) {
  let source, retry, heard, polled = false, called = 0;
  const rows = new Map(); // by peer id, of the events

  const heardOne = (swarm) => { heard = Date.now(); show(swarm); tell(); };

  const connect = () => {
    hangUp();
    if (document.hidden) return;
    called = Date.now();
    source = new EventSource("/api/events");
    source.onmessage = (event) => { polled = false; heardOne(whole(JSON.parse(event.data), rows)); };
    source.onerror = () => { if (source.readyState === EventSource.CLOSED) poll(); };
  };

  const hangUp = () => { source?.close(); clearTimeout(retry); };

  // EventSource gives up for good on any answer but 200: 503 for too many viewers, or what a proxy says in an outage.
  const poll = async () => {
    retry = setTimeout(connect, POLLED * (0.8 + 0.4 * Math.random()));
    try {
      const answer = await fetch("/api/swarm", { signal: AbortSignal.timeout(PATIENCE) });
      if (!answer.ok) return;
      polled = true;
      heardOne(await answer.json());
    } catch { /* status() says how old the figures are */ }
  };

  const tell = () => {
    const age = heard === undefined ? Infinity : Date.now() - heard;
    const fresh = age <= PATIENCE + (polled ? 1.2 * POLLED : 0);
    const first = heard === undefined && Date.now() - called < PATIENCE;
    status(fresh ? (polled ? "polled" : "live") : first ? "connecting" : "offline", age);
    const silent = Date.now() - Math.max(heard ?? 0, called);
    if (!document.hidden && source.readyState !== EventSource.CLOSED && silent > HALF_OPEN) connect();
  };

  document.addEventListener("visibilitychange", () => { if (document.hidden) hangUp(); else connect(); });
  addEventListener("online", connect);
  connect();
  setInterval(() => { if (!document.hidden) tell(); }, 1000);
}
