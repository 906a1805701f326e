"""`covey export`: a checkpoint's backbone as a file of weights."""

from pathlib import Path
from typing import Any

from averaging.experiment import canonical, fingerprint
from peer.trained import open_trained
from training.export import check_path, classifier_name, counterpart, torchvision_state, write_export


def export(checkpoint: Path, file: Path) -> dict[str, Any]:
    """Write the backbone of `checkpoint`, or of the newest one in that folder, to `file`; what was written.

    Raises BadInput.
    """
    check_path(file)
    trained = open_trained(checkpoint)
    state, experiment = torchvision_state(trained.objective), trained.experiment
    write_export(state, file, {"covey_epoch": str(trained.epoch), "covey_experiment": experiment.name,
                               "covey_fingerprint": fingerprint(canonical(experiment))})
    last = classifier_name(trained.objective)
    return {"checkpoint": str(trained.path), "file": str(file), "epoch": trained.epoch, "tensors": len(state),
            "numbers": sum(tensor.numel() for tensor in state.values()), "network": counterpart(experiment.model.trunk),
            "last_layer": last, "classes": experiment.data.num_classes if f"{last}.weight" in state else None}


def lines(exported: dict[str, Any]) -> str:
    """What was written, for people, and how to load it."""
    written = f"{exported['file']}: {exported['numbers']:,} numbers in {exported['tensors']} tensors, of epoch " \
              f"{exported['epoch']}"
    if exported["network"] is None:
        return f"{written}\nin torchvision's layout, though it has no network of these layers"
    network = f"torchvision.models.{exported['network']}"
    if exported["classes"] is None:
        return f"{written}\nfor {network}, whose {exported['last_layer']} it lacks: put torch.nn.Identity() there"
    return f"{written}\nfor {network}(num_classes={exported['classes']})"
