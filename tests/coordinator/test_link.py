import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.link import Link, parse_link
from training.errors import BadInput

hosts = st.sampled_from(["127.0.0.1", "gpu-box.example.org", "localhost", "::1", "2001:db8::17"])
certificates = st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True)
invites = st.from_regex(r"([A-Za-z0-9_-]{1,64})?", fullmatch=True)
DEMO = f"demo-1a/{'c' * 43}"
run_ids = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)


@given(hosts, st.integers(1, 65535), run_ids, certificates, invites)
def test_a_link_survives_being_written_down(host: str, port: int, run_id: str, certificate: str, invite: str) -> None:
    link = Link(host, port, run_id, certificate, invite)
    assert parse_link(f"  {link}\n") == link


def test_an_ipv6_host_has_brackets_where_a_port_follows() -> None:
    assert str(Link("::1", 31338, "demo-1a", "c" * 43)) == f"covey://[::1]:31338/{DEMO}"


@given(run_ids, certificates, invites)
def test_a_shell_takes_a_link_as_it_is(run_id: str, certificate: str, invite: str) -> None:
    link = str(Link("gpu-box.example.org", 31338, run_id, certificate, invite))
    assert shlex.quote(link) == link


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "does not start with covey://"),
    ("http://host:1/demo", "does not start with covey://"),
    ("host:31338/demo", "does not start with covey://"),
    ("covey:///demo", "no host"),
    ("covey://:31338/demo", "no host"),
    ("covey://ho st:31338/demo", "characters that no host has"),
    ("covey://me@host:31338/demo", "user name"),
    ("covey://host/demo", "no port"),
    ("covey://host:0/demo", "no port"),
    ("covey://host:65536/demo", "out of range"),
    ("covey://host:port/demo", "port"),
    ("covey://[::1:31338/demo", "Invalid IPv6 URL"),
    ("covey://host:31338", "no run id"),
    ("covey://host:31338/", "no run id"),
    ("covey://host:31338/Demo", "no run id"),
    ("covey://host:31338/demo", "no fingerprint"),
    ("covey://host:31338/demo/more", "no fingerprint"),
    (f"covey://host:31338/demo/{'c' * 42}", "no fingerprint"),
    (f"covey://host:31338/demo/{'c' * 44}", "no fingerprint"),
    (f"covey://host:31338/{DEMO}/", "no invite"),
    (f"covey://host:31338/{DEMO}/in vite", "no invite"),
    (f"covey://host:31338/{DEMO}/invite/more", "no invite"),
    ("covey://host:31338/../etc", "no run id"),
    (f"covey://host:31338/{'a' * 65}", "no run id"),
    (f"covey://host:31338/{DEMO}?invite=1&x=", "no 'invite', 'x'"),
    (f"covey://host:31338/{DEMO}#part", "after '#'"),
])
def test_a_malformed_link_is_refused_with_the_reason_on_one_line(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_link(text)
    assert complaint in refused.value.found
    assert "covey://HOST:PORT/RUN_ID/CERTIFICATE/INVITE" in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.text(max_size=60))
def test_any_text_is_a_link_or_bad_input(text: str) -> None:
    for attempt in (text, f"covey://{text}"):
        try:
            assert parse_link(attempt)
        except BadInput:
            continue
