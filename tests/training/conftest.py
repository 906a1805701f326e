"""A SwAV small enough to train within a test."""

from collections.abc import Callable

import pytest
import torch

from training.config import override, validate
from training.recipe import SwavTraining

TINY = {
    "name": "tiny",
    "model": {"trunk": {"depth": 18, "width_multiplier": 0.125, "stem": "3x3"},
              "head": {"dims": [0, 16, 8], "num_clusters": [6]}},
    "evaluation": {"resize_size": 16, "crop_size": 16},
    "data": {"image_size": 16,
             "transforms": {"total_num_crops": 4, "num_crops": [2, 2], "size_crops": [16, 8],
                            "crop_scales": [[0.3, 1.0], [0.1, 0.3]]}},
    "optimizer": {"lr": 0.1, "max_epochs": 10},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[..., SwavTraining]:
    """`tiny("loss.epsilon=0.1", ...)`: the tiny experiment with overrides."""
    return lambda *overrides: validate(SwavTraining, override(TINY, overrides))
