"""Configs: frozen, closed to unknown keys, made of a TOML recipe plus dotted overrides. Imports no torch."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from typing import Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError

from training.errors import BadInput

Tree = dict[str, Any]
SomeConfig = TypeVar("SomeConfig", bound="Config")


class Config(BaseModel):
    """Base of every config: immutable, an unknown key is an error, every field says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    refused: ClassVar[Mapping[str, str]] = {}  # names that people may look for here, and what to do instead


def recipe_names() -> list[str]:
    """The recipes that ship with covey, sorted."""
    return sorted(path.name.removesuffix(".toml") for path in files("training.recipes").iterdir()
                  if path.name.endswith(".toml"))


def read_recipe(name: str) -> Tree:
    """The shipped recipe `name`, or the TOML file at that path, laid over the recipe that its `base` names, if any.

    Raises BadInput with the nearest known name.
    """
    tree = _read_toml(name)
    base = tree.pop("base", None)
    return tree if base is None else _laid_over(read_recipe(str(base)), tree)


def _laid_over(base: Tree, tree: Tree) -> Tree:
    both = {key: _laid_over(base[key], tree[key]) for key in base.keys() & tree.keys()
            if isinstance(base[key], dict) and isinstance(tree[key], dict)}
    return {**base, **tree, **both}


def _read_toml(name: str) -> Tree:
    if name in recipe_names():
        text = files("training.recipes").joinpath(f"{name}.toml").read_text()
    elif name.endswith(".toml"):
        text = _read_file(name)
    else:
        raise BadInput(f"recipe {name!r}", expected=f"one of {', '.join(recipe_names())}, or a path to a .toml file",
                       mend=nearest(name, recipe_names()) or "`covey recipes` lists them.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{name}: {error}", expected="a TOML document", mend="Correct that line.") from None


def _read_file(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:  # noqa: PTH123
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe file {name!r} ({error})", expected="a readable TOML file",
                       mend="Check the path.") from None


def override(tree: Tree, overrides: Sequence[str]) -> Tree:
    """`tree` with every `dotted.key=value` laid over it; values are TOML, or else plain text."""
    tree = deepcopy(tree)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key or not all(key.split(".")):
            raise BadInput(f"override {item!r}", expected="key=value with a dotted key, as in loss.temperature=0.2",
                           mend="Write it so.")
        *parents, leaf = key.strip().split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise BadInput(f"override {item!r}", expected=f"a table at {parent!r}, which is {branch!r}",
                               mend=f"Override {parent!r} as a whole.")
        branch[leaf] = _toml_value(text.strip())
    return tree


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"true": True, "false": False}.get(text.lower(), text)


def validate(kind: type[SomeConfig], tree: Mapping[str, Any]) -> SomeConfig:
    """`tree` as a `kind`. Raises BadInput that names the dotted key, and for an unknown one the nearest known."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is both unknown and missing: the first says more.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = [name for name, _ in options(kind)]
            if reason := _refusal(kind, first["loc"]):
                raise BadInput(f"key {key!r}", expected="a key of this recipe", mend=reason) from None
            raise BadInput(f"unknown key {key!r}", expected="a key of this recipe",
                           mend=nearest(key, known) or "`covey recipes NAME` lists them.") from None
        if first["type"] == "missing":
            raise BadInput(f"no {key}", expected="a value for it", mend=f"Add it, as in {key}=...") from None
        message = first["msg"].removeprefix("Value error, ")
        found = f"{key} = {first['input']!r}" if key and not isinstance(first["input"], dict) else key or "the recipe"
        raise BadInput(found, expected=message[0].lower() + message[1:], mend="Change it.") from None


def _refusal(kind: type[Config], loc: tuple[int | str, ...]) -> str | None:
    *parents, leaf = loc
    for parent in parents:
        field = kind.model_fields.get(str(parent))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Config)):
            return None
        kind = field.annotation
    return kind.refused.get(str(leaf))


def nearest(name: str, known: Sequence[str]) -> str:
    """"Did you mean ...?", or nothing if nothing is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {match[0]!r}?" if match else ""


def options(kind: type[Config], prefix: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    """Every leaf option of `kind` as (dotted key, field), nested configs walked in order."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from options(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
