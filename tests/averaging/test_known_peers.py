"""Addresses for the next start survive, and a broken file costs nothing but them."""

from pathlib import Path

from averaging.known_peers import MOST, recall_peers, remember_peers


def test_what_is_remembered_is_recalled_once_each(tmp_path: Path) -> None:
    remember_peers(tmp_path / "known.json", ["/ip4/10.0.0.2/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"])
    assert recall_peers(tmp_path / "known.json") == ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"]


def test_an_empty_swarm_does_not_wipe_out_what_is_known(tmp_path: Path) -> None:
    remember_peers(tmp_path / "known.json", ["/ip4/10.0.0.1/tcp/1"])
    remember_peers(tmp_path / "known.json", [])
    assert recall_peers(tmp_path / "known.json") == ["/ip4/10.0.0.1/tcp/1"]


def test_no_more_than_the_most_are_kept(tmp_path: Path) -> None:
    remember_peers(tmp_path / "known.json", [f"/ip4/10.0.0.{number}/tcp/1" for number in range(100)])
    assert len(recall_peers(tmp_path / "known.json")) == MOST


def test_a_missing_broken_or_foreign_file_recalls_nobody(tmp_path: Path) -> None:
    for content in (None, "", "{", "{}", "[1, null]"):
        if content is not None:
            (tmp_path / "known.json").write_text(content)
        assert recall_peers(tmp_path / "known.json") == []
