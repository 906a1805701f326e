"""Command-line options made of a config's fields: name, type, bounds and meaning are told once."""

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, Union, get_args, get_origin

import typer

from training.config import Config

Command = TypeVar("Command", bound=Callable[..., None])


def options_of(kind: type[Config], *, inferred: Collection[str] = (), **aliases: str) -> Callable[[Command], Command]:
    """Gives a command that takes **given an option for every field of `kind`, under the field's own name.

    `aliases`: further flags, by field. The command finds in `given` what the user gave, paths made absolute; it is
    for pydantic to check the values. A field without default must be given, unless it is among the `inferred`.
    """
    def decorate(command: Command) -> Command:
        def run(*args: Any, **every: Any) -> None:
            given = {field: _absolute(every.pop(field)) for field in kind.model_fields}
            command(*args, **every, **{field: value for field, value in given.items() if value is not None})

        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [_parameter(kind, field, aliases, must=info.is_required() and field not in inferred)
                 for field, info in kind.model_fields.items()]
        run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*own, *added)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run  # type: ignore[return-value]

    return decorate


def _absolute(value: Any) -> Any:
    return value.expanduser().absolute() if isinstance(value, Path) else value


def _parameter(kind: type[Config], field: str, aliases: Mapping[str, str], *, must: bool) -> inspect.Parameter:
    info = kind.model_fields[field]
    flag = "--" + field.replace("_", "-")
    default = ",".join(info.default) if isinstance(info.default, tuple) else info.default
    shown = "" if info.is_required() or default is None or default is False else f"; default {default}"
    option = typer.Option(*[flag, aliases[field]] if field in aliases else [flag],
                          help=f"{info.description}{shown}", show_default=False)
    kind_of_value = _plain(info.annotation) if must else Optional[_plain(info.annotation)]  # noqa: UP045
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind_of_value, option],
                             default=inspect.Parameter.empty if must else None)


def _plain(annotation: Any) -> Any:
    """What of a field's type the command line can tell: text where it is neither number, switch nor path."""
    if get_origin(annotation) in {Union, types.UnionType}:
        (annotation,) = (each for each in get_args(annotation) if each is not types.NoneType)
    return annotation if annotation in {bool, int, float, Path} else str
