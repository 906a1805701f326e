import subprocess
import sys

import pytest
from pydantic import Field, ValidationError, model_validator

from training.config import Config, nearest, options, override, read_recipe, recipe_names, validate
from training.errors import BadInput
from training.recipe import ClassificationTraining, SwavTraining, Training


class Inner(Config):
    lr: float = Field(gt=0)
    sizes: tuple[int, ...] = (1, 2)


class Outer(Config):
    inner: Inner
    text: str = "plain"

    @model_validator(mode="after")
    def _text_is_short(self) -> "Outer":
        if len(self.text) > 5:
            raise ValueError("Text of at most 5 letters")
        return self


def refusal(tree: dict) -> str:
    with pytest.raises(BadInput) as refused:
        validate(Outer, tree)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_unknown_key_names_the_nearest_known_one() -> None:
    message = refusal({"inner": {"lr": 1, "size": [3]}})
    assert "'inner.size'" in message
    assert "'inner.sizes'" in message


def test_misspelt_required_key_is_called_unknown_rather_than_missing() -> None:
    assert "unknown key 'inner.lrr'" in refusal({"inner": {"lrr": 1}})


def test_key_under_the_wrong_table_is_found_where_it_belongs() -> None:
    assert "Did you mean 'inner.sizes'" in refusal({"inner": {"lr": 1}, "sizes": [1]})


def test_missing_key_is_named() -> None:
    assert refusal({"inner": {}}).startswith("no inner.lr; expected a value")


@pytest.mark.parametrize("value", [0, -1, "much", float("nan"), float("inf")])
def test_bad_value_is_named_with_its_key(value: object) -> None:
    assert f"inner.lr = {value!r}; expected " in refusal({"inner": {"lr": value}})


def test_failed_cross_check_reads_as_an_expectation() -> None:
    assert "the recipe; expected text of at most 5 letters" in refusal({"inner": {"lr": 1}, "text": "too long"})


def test_config_cannot_be_changed() -> None:
    config = validate(Outer, {"inner": {"lr": 1}})
    with pytest.raises(ValidationError):
        config.inner.lr = 2.0


@pytest.mark.parametrize(("text", "value"), [
    ("0.2", 0.2), ("[3000, 3000]", [3000, 3000]), ("true", True), ("False", False), ("'a b'", "a b"),
    ("multicrop_2x224", "multicrop_2x224"), ("1e-3", 1e-3), ("a=b", "a=b"), ("", ""),
])
def test_override_takes_toml_values_and_plain_text(text: str, value: object) -> None:
    assert override({}, [f"a.b.c={text}"]) == {"a": {"b": {"c": value}}}


def test_later_override_wins_and_the_tree_stays_as_it_was() -> None:
    tree = {"a": {"b": 1, "c": 2}}
    assert override(tree, ["a.b=3", "a.b=4"]) == {"a": {"b": 4, "c": 2}}
    assert tree == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("item", ["", "a", "=1", "a..b=1", ".a=1", "a.=1"])
def test_malformed_override_is_refused(item: str) -> None:
    with pytest.raises(BadInput, match="key=value"):
        override({}, [item])


def test_override_below_a_plain_value_is_refused_rather_than_dropping_that_value() -> None:
    with pytest.raises(BadInput, match=r"'transforms', which is 'multicrop_6x160'"):
        override({"data": {"transforms": "multicrop_6x160"}}, ["data.transforms.blur_probability=0"])


def test_unknown_recipe_names_those_that_there_are() -> None:
    with pytest.raises(BadInput) as refused:
        read_recipe("no-such-recipe")
    assert all(name in refused.value.expected for name in recipe_names())


def test_recipe_is_read_from_a_file(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text("name = 'mine'\n[loss]\nepsilon = 0.03\n")
    assert read_recipe(str(tmp_path / "mine.toml")) == {"name": "mine", "loss": {"epsilon": 0.03}}


def test_recipe_file_that_is_missing_or_malformed_is_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "bad.toml").write_text("name = \n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("missing.toml", "bad.toml", "binary.toml"):
        with pytest.raises(BadInput) as refused:
            read_recipe(str(tmp_path / name))
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


def test_nearest_is_silent_where_nothing_is_near() -> None:
    assert nearest("loss.temprature", ["loss.temperature", "loss.epsilon"]) == "Did you mean 'loss.temperature'?"
    assert nearest("zzz", ["loss.temperature"]) == ""


@pytest.mark.parametrize("kind", [SwavTraining, ClassificationTraining])
def test_every_option_is_described(kind: type[Training]) -> None:
    described = {name: field.description for name, field in options(kind)}
    assert {"model.trunk.depth", "data.transforms.num_crops", "optimizer.larc.clip"} <= described.keys()
    assert [name for name, description in described.items() if not description] == []


def test_configs_import_no_torch() -> None:
    code = "import sys, training.recipe; sys.exit('torch' in sys.modules or 'hivemind' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
