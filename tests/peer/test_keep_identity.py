"""An identity travels in a file: the same volunteer on another machine, and nothing half done on the way."""

import json
import shutil
import stat
from pathlib import Path

import pytest

from averaging.identity import open_key, peer_id_of, public_bytes, read_key
from coordinator.state_dir import Role, open_state_dir
from peer.daemon import default_state_dir
from peer.keep_identity import export_to, import_from
from training.errors import BadInput

RUN, OTHER = "demo-0123456789ab", "demo-ba9876543210"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two identities' files, as making one takes time."""
    folder = tmp_path_factory.mktemp("keys")
    for number in range(2):
        open_key(folder / f"{number}.key")
    return [(folder / f"{number}.key").read_bytes() for number in range(2)]


def peer_at(folder: Path, key: bytes, run_id: str = RUN, role: Role = "peer") -> Path:
    """A state directory such as `covey join` leaves."""
    with open_state_dir(folder, role=role, run_id=run_id):
        (folder / "identity.key").write_bytes(key)
    return folder


def peer_id(folder: Path) -> str:
    return peer_id_of(public_bytes(read_key(folder / "identity.key")))


def test_an_identity_comes_out_as_it_went_in(tmp_path: Path, keys: list[bytes]) -> None:
    old, file = peer_at(tmp_path / "old", keys[0]), tmp_path / "me.json"
    assert export_to(file, old) == peer_id(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_bytes())["peer_id"] == peer_id(old)
    told, folder = import_from(file, tmp_path / "new")
    assert (told, folder) == (peer_id(old), tmp_path / "new")
    assert (folder / "identity.key").read_bytes() == keys[0]
    assert stat.S_IMODE((folder / "identity.key").stat().st_mode) == 0o600
    with open_state_dir(folder, role="peer", run_id=RUN):  # as `covey join` will
        assert sorted(path.name for path in folder.iterdir()) == ["identity.key", "lock", "owner.json"]


def test_without_a_word_it_is_the_only_peer_here_and_goes_where_join_looks_first(
        tmp_path: Path, keys: list[bytes]) -> None:
    home = peer_at(default_state_dir(RUN, 1), keys[0])
    peer_at(default_state_dir("x", 1).parent / "coordinator", keys[1], role="coordinator")
    assert export_to(tmp_path / "me.json", None) == peer_id(home)
    shutil.rmtree(home)
    assert import_from(tmp_path / "me.json", None)[1] == default_state_dir(RUN, 1)
    assert (home / "identity.key").read_bytes() == keys[0]


def test_of_none_or_of_several_one_has_to_be_named(tmp_path: Path, keys: list[bytes]) -> None:
    with pytest.raises(BadInput, match=r"^0 peers' state directories here; expected one.*--state-dir"):
        export_to(tmp_path / "me.json", None)
    for number in (1, 2):
        peer_at(default_state_dir(RUN, number), keys[0])
    with pytest.raises(BadInput, match=r"^2 peers' state directories here, .*--state-dir"):
        export_to(tmp_path / "me.json", None)
    assert not (tmp_path / "me.json").exists()


def test_an_import_is_the_same_twice_and_never_takes_the_place_of_another(tmp_path: Path, keys: list[bytes]) -> None:
    export_to(tmp_path / "me.json", peer_at(tmp_path / "old", keys[0]))
    for _ in range(2):
        import_from(tmp_path / "me.json", tmp_path / "new")
    other = peer_at(tmp_path / "other", keys[1])
    with pytest.raises(BadInput, match="another identity in"):
        import_from(tmp_path / "me.json", other)
    assert (other / "identity.key").read_bytes() == keys[1]


def test_an_import_into_a_folder_of_another_run_or_of_a_peer_that_runs_is_refused(
        tmp_path: Path, keys: list[bytes]) -> None:
    export_to(tmp_path / "me.json", peer_at(tmp_path / "old", keys[0]))
    with pytest.raises(BadInput, match=f"belongs to a peer of {OTHER}"):
        import_from(tmp_path / "me.json", peer_at(tmp_path / "other", keys[1], run_id=OTHER))
    with open_state_dir(tmp_path / "new", role="peer", run_id=RUN), pytest.raises(BadInput, match="held by process"):
        import_from(tmp_path / "me.json", tmp_path / "new")


def test_a_file_that_is_there_already_or_can_not_be_written_is_bad_input(tmp_path: Path, keys: list[bytes]) -> None:
    old = peer_at(tmp_path / "old", keys[0])
    (tmp_path / "me.json").write_text("mine")
    for file in (tmp_path / "me.json", tmp_path / "nowhere" / "me.json", tmp_path, tmp_path / "me.json" / "below"):
        with pytest.raises(BadInput, match="expected a new file") as refused:
            export_to(file, old)
        assert "\n" not in str(refused.value)
    assert (tmp_path / "me.json").read_text() == "mine"


def test_only_a_peers_identity_is_exported(tmp_path: Path, keys: list[bytes]) -> None:
    """A coordinator's node has one as well, and two nodes of one identity would be in each other's way."""
    file = tmp_path / "me.json"
    with pytest.raises(BadInput, match="expected a peer's state directory"):
        export_to(file, peer_at(tmp_path / "coordinator", keys[0], role="coordinator"))
    with pytest.raises(BadInput, match=r"identity\.key"):
        export_to(file, tmp_path / "empty")
    broken = peer_at(tmp_path / "broken", b"garbage")
    with pytest.raises(BadInput, match=r"identity\.key"):
        export_to(file, broken)
    for owner in ("[]", "{", "{}", "null", '{"role": "peer"}', '{"role": "peer", "run_id": 7}'):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "identity.key").write_bytes(keys[0])
        (tmp_path / "old" / "owner.json").write_text(owner)
        with pytest.raises(BadInput, match="expected a peer's state directory") as refused:
            export_to(file, tmp_path / "old")
        assert "\n" not in str(refused.value)
    assert not file.exists()


def test_what_export_did_not_write_is_bad_input_and_leaves_nothing(tmp_path: Path, keys: list[bytes]) -> None:
    export_to(tmp_path / "me.json", peer_at(tmp_path / "old", keys[0]))
    good = json.loads((tmp_path / "me.json").read_bytes())
    for what, wrong in {
            "empty": "", "text": "hello", "a list": "[]", "an empty object": "{}",
            "more than that": json.dumps({**good, "more": 1}), "no base64": json.dumps({**good, "key": "?" * 40}),
            "no key": json.dumps({**good, "key": "aGVsbG8="}), "an empty key": json.dumps({**good, "key": ""}),
            "a key cut short": json.dumps({**good, "key": good["key"][:400]}),
            "a run outside": json.dumps({**good, "run_id": "../../outside"}),
            "a run nowhere": json.dumps({**good, "run_id": "/tmp"}), "no run": json.dumps({**good, "run_id": ""}),
            }.items():
        (tmp_path / "wrong.json").write_text(wrong)
        for folder in (None, tmp_path / "new"):
            with pytest.raises(BadInput) as refused:
                import_from(tmp_path / "wrong.json", folder)
            assert "\n" not in str(refused.value), what
        assert not (tmp_path / "new").exists(), what
        assert not default_state_dir(RUN, 1).parent.exists(), what
    with pytest.raises(BadInput, match="No such file"):
        import_from(tmp_path / "nowhere.json", None)
    (tmp_path / "wrong.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="expected what `covey identity export` wrote"):
        import_from(tmp_path / "wrong.json", None)


def test_a_key_that_is_none_leaves_a_folder_that_was_there_as_it_was(tmp_path: Path, keys: list[bytes]) -> None:
    export_to(tmp_path / "me.json", peer_at(tmp_path / "old", keys[0]))
    wrong = {**json.loads((tmp_path / "me.json").read_bytes()), "key": "aGVsbG8="}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with open_state_dir(tmp_path / "new", role="peer", run_id=RUN):
        pass
    with pytest.raises(BadInput, match="expected what `covey identity export` wrote"):
        import_from(tmp_path / "wrong.json", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lock", "owner.json"]
