"""Checkpoints on the Hugging Face hub. Needs the extra `hub`."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.errors import BadInput

NAME = "newest"  # of the files there; their history has the earlier ones


def check_hub(repo: str) -> None:
    """Raises BadInput unless one could upload to `repo`, as far as that is known without asking the hub."""
    if find_spec("huggingface_hub") is None:
        raise BadInput("--upload-to-hub without the package huggingface-hub", expected="it to be installed",
                       mend="pip install 'covey[hub]'")
    utils = _module("huggingface_hub.utils")
    try:
        utils.validate_repo_id(repo)
    except utils.HFValidationError as error:
        raise BadInput(f"--upload-to-hub {repo}", expected=f"a repository, as in me/model ({error})",
                       mend="Correct it.") from None
    if not utils.get_token():
        raise BadInput("no token for the hub", expected="one that may write, in HF_TOKEN or by `hf auth login`",
                       mend="Set it, or leave out --upload-to-hub.")


def upload(repo: str, path: Path, epoch: int) -> None:
    """Commit the checkpoint `path` and its JSON to `repo`, which is made if need be, private.

    Raises what httpx and huggingface-hub raise, OSError where the files are gone.
    """
    hub = _module("huggingface_hub")
    _module("huggingface_hub.utils").disable_progress_bars()
    api = hub.HfApi()
    api.create_repo(repo, exist_ok=True, private=True)
    files = [(f"{NAME}{suffix}", path.with_suffix(suffix)) for suffix in (".safetensors", ".json")]
    api.create_commit(repo, [hub.CommitOperationAdd(name, str(file)) for name, file in files],
                      commit_message=f"epoch {epoch}")


def _module(name: str) -> Any:
    return import_module(name)
