"""Commands from declared options: each field of a dataclass is an option of the command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from types import GenericAlias, NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.cli.console import Console
from quest_deploy.options import Declared, declared
from quest_deploy.stages.workspaces import open_workspace

Command = Callable[[dict[str, Any], Console], None]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]


def command(arguments: type) -> Callable[[Command], Callable[..., None]]:
    """Make a command of a function that takes what the user chose of the options of ``arguments``,
    by name and as Python has it, and the console. What was not chosen and has no default here is
    left out: it is the function's to choose.
    """
    options = declared(arguments)

    def decorate(work: Command) -> Callable[..., None]:
        @functools.wraps(work)
        def run(*, as_json: bool, **values: Any) -> None:
            chosen = {name: value for name, value in values.items() if value is not None}
            for name, value in chosen.items():
                if (parse := options[name].option.parse) is not None:
                    chosen[name] = parse(value)
            work(chosen, Console(as_json=as_json))

        of_json = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption
        )
        parameters = [*map(_parameter, options.values()), of_json]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def opened(chosen: dict[str, Any]) -> Workspace:
    """The workspace that the user chose."""
    return open_workspace(*(chosen.get(name) for name in ("workspace", "model", "bits")))


def _parameter(each: Declared) -> inspect.Parameter:
    """How typer takes an option."""
    option = each.option
    kind = option.text or _text_type(each.kind)
    default = None if isinstance(each.default, tuple) else each.default
    annotation: Any = kind | None if default is None else kind
    shown: dict[str, Any] = {
        "help": option.help,
        "metavar": option.metavar,
        "show_default": option.default,
    }
    if kind in (int, float, list[int]):
        shown |= {"min": option.minimum, "max": option.maximum}
    flags = option.flags or ((f"--{each.name.replace('_', '-')}",) if kind is bool else ())
    info = typer.Argument(**shown) if option.argument else typer.Option(*flags, **shown)
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[annotation, info],
    )


def _text_type(kind: Any) -> Any:
    """The type without None, a list for a sequence."""
    if NoneType in get_args(kind):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    return GenericAlias(list, get_args(kind)) if get_origin(kind) is Sequence else kind
