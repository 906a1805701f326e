"""Real images from end to end: scikit-learn's handwritten digits, a folder, a swarm, a checkpoint, an accuracy."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits
from swarm import Swarm

EPOCHS = 80


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 1,797 digits as PNG files in class folders, a fifth of each class held out in val; one file is broken."""
    folder = tmp_path_factory.mktemp("digits")
    bunch = load_digits()
    for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        path = folder / ("val" if number % 5 == 0 else "train") / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).resize((16, 16)).save(path)
    (folder / "train" / "0" / "broken.png").write_bytes(b"\x89PNG, but no more")
    return folder


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path_factory.mktemp("swarm"), recipe=str(Path(__file__).parent / "digits.toml"))
    yield swarm
    swarm.close()


def evaluate(checkpoint: str, data: Path) -> dict:
    done = subprocess.run([sys.executable, "-m", "peer.cli", "evaluate", checkpoint, "--data", str(data), "--json"],
                          capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_two_volunteers_learn_handwritten_digits_without_labels(swarm: Swarm, digits: Path) -> None:
    pair = [swarm.join("--data", str(digits), "--batch-size", "64", "--stop-at-epoch", str(EPOCHS),
                       "--checkpoint-every-epochs", "1", "--keep-last-checkpoints", str(EPOCHS),
                       "--evaluate-every-epochs", str(EPOCHS // 2)) for _ in range(2)]
    (ada, _), (grace, _) = ends = [(volunteer.wait_for("finished")[0], volunteer) for volunteer in pair]
    assert ada["parameters_checksum"] == grace["parameters_checksum"]
    for end, volunteer in ends:
        (skipped,) = volunteer.all("skipped")
        assert skipped["path"].endswith("broken.png")
        halfway, at_the_end = volunteer.all("evaluated")
        assert (halfway["epoch"], at_the_end["epoch"]) == (EPOCHS // 2, EPOCHS)
        rows = list(csv.DictReader((Path(end["checkpoint"]).parents[1] / "metrics.csv").open()))
        epochs = [int(row["epoch"]) for row in rows]
        assert epochs == sorted(set(epochs))
        assert epochs[-1] == EPOCHS
        assert float(rows[-1]["knn_accuracy"]) == pytest.approx(at_the_end["figures"]["knn_accuracy"])
    trained = evaluate(ada["checkpoint"], digits)
    assert trained["knn_accuracy"] == pytest.approx(at_the_end["figures"]["knn_accuracy"], abs=0.02)
    first = min(Path(ada["checkpoint"]).parent.glob("*.safetensors"))
    begun = evaluate(str(first), digits)
    print(f"k-NN accuracy after {begun['epoch']} epochs {begun['knn_accuracy']:.3f}, "
          f"after {trained['epoch']} {trained['knn_accuracy']:.3f}")
    assert trained["val_images"] == 360
    assert trained["knn_accuracy"] > 0.8
    assert trained["knn_accuracy"] > begun["knn_accuracy"] + 0.03
