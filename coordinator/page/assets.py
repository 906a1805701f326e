"""What the status page is made of: our own files, the chart library's from its package, and the page's policy."""

import gzip
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template

from starlette.requests import Request
from starlette.responses import Response

from coordinator.view import INVITE, About

TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
OURS = ("page.css", "page.js", "figures.js", "rounds.js", "table.js", "peers.js", "leaderboard.js",
        "charts.js", "chart_list.js", "gist.js", "live.js", "icon.svg")
CHARTS = "plotly.min.js"


@dataclass(frozen=True)
class Asset:
    """A file as it is sent; `etag` names these bytes and no others."""

    body: bytes
    gzipped: bytes
    media_type: str
    etag: str


def asset(body: bytes, media_type: str) -> Asset:
    """An asset of these bytes, compressed once for all who ask."""
    return Asset(body, gzip.compress(body, 6, mtime=0), media_type, f'"{sha256(body).hexdigest()[:32]}"')


@cache
def static_files() -> Mapping[str, Asset]:
    """By name, all that the page loads. Takes a third of a second, for the chart library."""
    ours = files("coordinator.page")
    return {CHARTS: asset((files("plotly") / "package_data" / CHARTS).read_bytes(), TYPES["js"]),
            **{name: asset((ours / name).read_bytes(), TYPES[name.rpartition(".")[2]]) for name in OURS}}


def answer(request: Request, found: Asset, headers: Mapping[str, str] | None = None) -> Response:
    """`found`, or 304 for a browser that has it already: it asks every time, so that an upgrade shows at once."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    zipped = "gzip" in request.headers.get("accept-encoding", "")
    coding = {"Content-Encoding": "gzip"} if zipped else {}
    always = {"ETag": found.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding", **(headers or {})}
    if found.etag in known:
        return Response(status_code=304, headers=always)
    return Response(found.gzipped if zipped else found.body, media_type=found.media_type, headers={**always, **coding})


def document(about: About) -> Asset:
    """The page. Its figures come by /api/events and are set as text by its scripts."""
    template = Template((files("coordinator.page") / "page.html").read_text())
    invited = f", with your invite in the place of {INVITE}" if about.link.endswith(f"/{INVITE}") else ""
    text = template.substitute(run_id=escape(about.run_id), link=escape(about.link), version=escape(about.version),
                               invited=invited)
    return asset(text.encode(), "text/html; charset=utf-8")


@cache
def content_security_policy() -> str:
    """Scripts and connections of this origin only; styles too, but for those that the chart library makes. And a script
    that made markup of a string would fail (trusted types)."""
    return (f"default-src 'none'; script-src 'self'; style-src 'self' {' '.join(_chart_styles())}; connect-src 'self'; "
            "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'")


def _chart_styles() -> list[str]:
    # plotly.js makes style elements as it loads: empty ones, to which it adds rules through the CSSOM, and one with its
    # maps' style sheet, which is a literal in its source. Their hashes let in these, and no other style.
    literals = re.findall(rb"\.textContent='((?:[^'\\])*)'", static_files()[CHARTS].body)
    return [f"'sha256-{b64encode(sha256(text).digest()).decode()}'" for text in (b"", *literals)]
