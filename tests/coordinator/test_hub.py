"""Uploads, by the real library, to a fake of the hub that speaks its HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, fake_hub
from huggingface_hub import constants

from coordinator import hub as uploads
from coordinator.hub import check_hub, upload
from training.errors import BadInput


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol for large files, not faked
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "epoch-00000040.safetensors"
    path.write_bytes(bytes(range(256)) * 10)
    path.with_suffix(".json").write_text('{"epoch": 40}')
    return path


def test_a_checkpoint_is_one_commit_of_both_files(hub: FakeHub, checkpoint: Path) -> None:
    upload("me/model", checkpoint, 40)
    assert hub.repos == {"me/model": True}, "private, unless the owner made it otherwise"
    assert hub.commits == [("epoch 40", {"newest.safetensors": checkpoint.read_bytes(),
                                         "newest.json": checkpoint.with_suffix(".json").read_bytes()})]
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_hub_that_fails_raises(hub: FakeHub, checkpoint: Path) -> None:
    hub.broken = True
    with pytest.raises(Exception, match="503"):
        upload("me/model", checkpoint, 40)
    assert not hub.commits


def test_a_good_repository_and_a_token_are_asked_for_at_the_start(monkeypatch: pytest.MonkeyPatch,
                                                                  tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_hub("me/model")
    with pytest.raises(BadInput, match="me/my/model"):
        check_hub("me/my/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match="no token for the hub"):
        check_hub("me/model")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"pip install 'covey\[hub\]'"):
        check_hub("me/model")
