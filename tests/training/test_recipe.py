from collections.abc import Callable

import pytest

from training.config import validate
from training.errors import BadInput
from training.recipe import SwavTraining

Tiny = Callable[..., SwavTraining]


@pytest.mark.parametrize(("overrides", "complaint"), [
    (["loss.crops_for_assign=[0, 4]"], "crops_for_assign within 0 to 3"),
    (["loss.crops_for_assign=[1, 1]"], "without repetition"),
    (["loss.crops_for_assign=[]"], "loss.crops_for_assign"),
    (["data.transforms.total_num_crops=1", "data.transforms.num_crops=[1]", "data.transforms.size_crops=[8]",
      "data.transforms.crop_scales=[[0.1, 1]]"], "total_num_crops of 2 or more"),
    (["model.head.dims=[2048, 128]"], "head.dims to begin with 64"),
    (["model.head.dims=[0, 0, 8]"], "only the first may be 0"),
    (["model.head.num_clusters=[1]"], "model.head.num_clusters.0"),
    (["model.trunk.depth=20"], "model.trunk.depth"),
    (["model.trunk.width_multiplier=0.01"], "model.trunk.width_multiplier"),
    (["optimizer.name=adamw", "optimizer.use_larc=true"], "LARC"),
    (["optimizer.name=rmsprop"], "optimizer.name"),
    (["optimizer.warmup_epochs=11"], "warmup_epochs within max_epochs = 10"),
    (["optimizer.eta_min=1"], "eta_min of at most lr"),
    (["objective=simclr"], "objective"),
    (["name='two words'"], "name"),
    (["loss.temprature=0.2"], "Did you mean 'loss.temperature'"),
])
def test_what_does_not_fit_is_refused_before_training(tiny: Tiny, overrides: list[str], complaint: str) -> None:
    with pytest.raises(BadInput) as refused:
        tiny(*overrides)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_head_input_may_be_stated_or_left_to_the_trunk(tiny: Tiny) -> None:
    stated, inferred = tiny("model.head.dims=[64, 16, 8]"), tiny("model.head.dims=[0, 16, 8]")
    assert stated.model.head_dims == inferred.model.head_dims == (64, 16, 8)


def test_training_survives_json(tiny: Tiny) -> None:
    training = tiny("loss.crops_for_assign=[0, 2]", "optimizer.use_larc=true")
    assert validate(SwavTraining, training.model_dump(mode="json")) == training
