"""Options of `data.*`: what is accepted, what it means, and what is refused."""

import pytest

from training.config import validate
from training.data.config import Data
from training.data.transforms_config import PRESETS
from training.errors import BadInput


def test_preset_names_stand_for_the_published_variants() -> None:
    published = {"multicrop_2x224_6x96": ((2, 6), (224, 96)), "multicrop_2x224_4x96": ((2, 4), (224, 96)),
                 "multicrop_2x160_4x96": ((2, 4), (160, 96)), "multicrop_6x160": ((6,), (160,)),
                 "multicrop_2x224": ((2,), (224,)), "imagenet_train_176": ((1,), (176,)),
                 "cifar10_train": ((1,), (32,))}
    assert published.keys() == PRESETS.keys()
    for name, (counts, sizes) in published.items():
        made = validate(Data, {"transforms": name}).transforms
        assert (made.num_crops, made.size_crops, made.total_num_crops) == (counts, sizes, sum(counts))
    assert validate(Data, {"transforms": "multicrop_2x224"}).transforms.crop_scales == ((0.08, 1.0),)
    assert validate(Data, {}).transforms == validate(Data, {"transforms": "multicrop_2x224_6x96"}).transforms


@pytest.mark.parametrize("name", ["imagenet_train_176", "cifar10_train"])
def test_classifiers_see_one_crop_in_its_own_colours(name: str) -> None:
    t = validate(Data, {"transforms": name}).transforms
    assert t.total_num_crops == 1
    assert t.color_jitter_probability == t.grayscale_probability == t.blur_probability == 0


@pytest.mark.parametrize(("options", "expected"), [
    ("multicrop_2x224_5x96", "Did you mean 'multicrop_2x224_6x96'"),
    ({"num_crops": [2, 4]}, "total_num_crops = 6"),
    ({"size_crops": [224]}, "one entry per size"),
    ({"crop_scales": [[0.5, 1.5], [0.1, 0.2]]}, "at most 1"),
    ({"crop_scales": [[0.5, 0.2], [0.1, 0.2]]}, "low <= high"),
    ({"std": [1, 0, 1]}, "std above 0"),
    ({"interpolation": "nearest"}, "'bilinear', 'bicubic' or 'triangular'"),
])
def test_transforms_that_make_no_sense_are_bad_input(options: object, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        validate(Data, {"transforms": options})


@pytest.mark.parametrize(("options", "expected"), [
    ({"dataset": "cifar10", "num_classes": 100}, "num_classes = 10, which cifar10 has"),
    ({"dataset": "synthetic", "num_classes": 10}, "num_classes = 16, which synthetic has"),
    ({"dataset": "imagenet"}, "'shards'"),
])
def test_data_sets_that_contradict_themselves_are_bad_input(options: dict[str, object], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        validate(Data, options)


def test_schedules_learn_how_many_images_a_pass_has() -> None:
    assert validate(Data, {}).images_per_pass == 1_281_167
    assert validate(Data, {"num_images": 1000}).images_per_pass == 1000
    assert validate(Data, {"dataset": "cifar10"}).images_per_pass == 50_000
    assert validate(Data, {"dataset": "synthetic", "synthetic": {"num_train": 64}}).images_per_pass == 64


def test_classes_and_sizes_are_known_beforehand_where_the_data_set_fixes_them() -> None:
    known = {name: validate(Data, {"dataset": name, "image_size": 64}) for name in ("synthetic", "cifar10", "shards")}
    assert {name: data.known_classes for name, data in known.items()} == {
        "synthetic": 16, "cifar10": 10, "shards": None}
    assert {name: data.known_side for name, data in known.items()} == {"synthetic": 64, "cifar10": 32, "shards": None}
