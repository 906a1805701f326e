"""The status page: one HTML document without anything from afar. It renders itself anew every two seconds."""

from base64 import b64encode
from hashlib import sha256
from html import escape
from typing import Any

from coordinator.view import About

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d9dde3, #353b45); --faint: light-dark(#5c6470, #9aa4b2);
  --card: light-dark(#fff, #1c2027); --ground: light-dark(#f5f6f8, #14171c); --accent: light-dark(#1f6feb, #58a6ff);
  --alarm: light-dark(#9a3412, #fdba74); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--ground);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; } h2 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .25rem 0; } .faint { color: var(--faint); } .alarm { color: var(--alarm); font-weight: 600; }
code { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .15rem .45rem;
  display: inline-block; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
dl > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
dt { color: var(--faint); font-size: .85rem; }
dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; } dd small { font-size: .85rem; }
progress { display: block; width: 100%; height: .5rem; accent-color: var(--accent); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .65rem; text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: .85rem; } tbody tr { border-top: 1px solid var(--line); }
.text { text-align: left; }
"""

SCRIPT = """
const swarm = () => document.getElementById("swarm"), offline = document.getElementById("offline");
setInterval(async () => {
  if (document.hidden) return;
  try {
    const answer = await fetch("/", {signal: AbortSignal.timeout(5000)});
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    swarm().replaceWith(page.getElementById("swarm"));
    offline.hidden = true;
  } catch { offline.hidden = false; }
}, 2000);
"""


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = (f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
                           "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def render(swarm: dict[str, Any], about: About, fresh: bool) -> str:
    """The document for a `view` of the swarm; `fresh`: its reading tells what the swarm is now."""
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(about.run_id)} · covey</title><style>{STYLE}</style></head>
<body>
<header><h1>{escape(about.run_id)}</h1>
<p>Join: <code>covey join {escape(about.link)}</code></p>
<p class="faint">covey {escape(about.version)} · <a href="/api/swarm">JSON</a> · <a href="/metrics">metrics</a></p>
<p id="offline" class="alarm" role="status" hidden>The coordinator does not answer: these figures are old.</p>
</header>
<main id="swarm">{_warning(swarm, fresh)}{_tiles(swarm)}{_peers(swarm["peers"])}{_rounds(swarm)}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _warning(swarm: dict[str, Any], fresh: bool) -> str:
    if fresh:
        return ""
    then = "The DHT has not been read yet." if swarm["time_seconds"] == 0 else (
        "The coordinator could not read the DHT lately: these figures are old.")
    return f'<p class="alarm" role="status">{then}</p>'


def _tiles(swarm: dict[str, Any]) -> str:
    samples, target = swarm["epoch_samples"], swarm["target_batch_size"]
    done = min(samples, target)
    progress = f'<progress max="{target}" value="{done}" aria-label="towards the next epoch"></progress>'
    tiles = {
        "Epoch": f"{swarm['epoch']:,}",
        "Next epoch": f"{samples:,} <small>of {target:,} samples</small>{progress}",
        "Loss": _loss(swarm["loss"]),
        "Samples/s": f"{swarm['samples_per_second']:,.1f}",
        "Peers": f"{len(swarm['peers']):,}",
        "Group size": f"{swarm['group_size']} <small>of at most {swarm['target_group_size']}</small>",
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items()) + "</dl>"


def _peers(peers: list[dict[str, Any]]) -> str:
    if not peers:
        return "<h2>Peers</h2><p>No peer is here. Start one with the command above, on any machine.</p>"
    rows = [[_text(peer["name"]), _text(peer["state"]), f"{peer['epoch']:,}", f"{peer['samples_accumulated']:,}",
             f"{peer['samples_per_second']:,.1f}", _loss(peer["loss"]), f"{peer['group_size']}",
             f"{peer['last_seen_seconds']:.0f} s ago", _text(peer["device"]), _text(peer["version"]),
             _text(peer["mode"])] for peer in peers]
    return _table("Peers", ["<Name", "<State", "Epoch", "Samples", "Samples/s", "Loss", "Group", "Heard", "<Device",
                            "<Version", "<Mode"], rows)


def _rounds(swarm: dict[str, Any]) -> str:
    rows = [[f"{swarm['rounds'][outcome]:,}" for outcome in ("averaged", "failed", "alone")]]
    departures = swarm["departures"]
    churn = (f"{swarm['joins']:,} joined, {departures['left']:,} left, {departures['lost']:,} lost, "
             f"{swarm['samples_total']:,} samples since the coordinator started.")
    table = _table("Averaging rounds, summed over peers", ["Averaged", "Failed", "Alone"], rows)
    return f'{table}<p class="faint">{churn}</p>'


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    # "<" before a column's name: text, at the left
    left = [column.startswith("<") for column in columns]
    heads = "".join(f'<th scope="col"{_side(text)}>{column.lstrip("<")}</th>'
                    for column, text in zip(columns, left, strict=True))
    body = "".join("<tr>" + "".join(f"<td{_side(text)}>{cell}</td>" for cell, text in zip(row, left, strict=True))
                   + "</tr>" for row in rows)
    return (f'<h2>{title}</h2><div class="scroll" tabindex="0" role="region" aria-label="{title}"><table><thead><tr>'
            f"{heads}</tr></thead><tbody>{body}</tbody></table></div>")


def _side(text: bool) -> str:
    return ' class="text"' if text else ""


def _text(text: str) -> str:
    return escape(text)


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"
