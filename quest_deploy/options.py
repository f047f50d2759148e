"""Options, each declared once: a field of a dataclass, which an :class:`Option` makes.

>>> @dataclass(frozen=True, kw_only=True)
... class Bake(Options):
...     minutes: int = Option("How long.", minimum=1).field(40)

What a command takes and helps with, the parameters of its function, the values that are refused,
the names in files and the documentation's tables are read from these fields.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import EnumType
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from quest_deploy.errors import InputError

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
V = TypeVar("V")
T = TypeVar("T", bound="Options")


@dataclass(frozen=True)
class Option:
    """What an option is, besides its field's name, type and default.

    Attributes:
        help: what it is for, in a sentence.
        flags: at the command line; empty means ``--name``.
        minimum, maximum, choices: of its value, or of each value; None has none.
        metavar: what the command's help shows for its value.
        default: what the help shows for a default that is found out later; False shows none.
        text: its type at the command line, where that is another one.
        parse: the value of such a text.
        argument: whether the command line has it without a flag.
        recorded: its name in files; empty means its own.
        held: a dataclass that a path becomes by its ``of(path, flag)``; files have its fields.
    """

    help: str | None = None
    flags: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    metavar: str | None = None
    default: str | bool = True
    text: Any = None
    parse: Callable[[Any], Any] | None = None
    argument: bool = False
    recorded: str = ""
    held: Any = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of a field that has no default, or is no keyword."""
        return {"option": self}

    def field(self, default: V) -> V:
        """A dataclass's field with this option."""
        return field(default=default, metadata=self.metadata)


@dataclass(frozen=True)
class Declared:
    """A field with its option; ``default`` is ``MISSING`` where it must be given."""

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """How messages call it."""
        longest = max(self.option.flags, key=len, default=f"--{self.name.replace('_', '-')}")
        return longest.partition("/")[0]

    @property
    def recorded(self) -> str:
        """How files call it."""
        return self.option.recorded or self.name

    def hold(self, value: Any) -> Any:
        """A path, or a record of what it became, as what :attr:`Option.held` says; of none None."""
        kind = self.option.held
        if kind is None:
            return value
        if isinstance(value, tuple):
            return tuple(map(self.hold, value)) or None
        if isinstance(value, Mapping):
            return kind(**value)
        return kind.of(value, self.flag) if isinstance(value, Path | str) else value

    def check(self, value: Any) -> None:
        """Raise InputError for a value of another type, out of range or not finite."""
        option = self.option
        if not _fits(value, self.kind):
            raise InputError(f"{self.flag}: expected {_named(self.kind)}, not {value!r}")
        for each in value if isinstance(value, tuple) else (value,):
            if each is None:
                continue
            whole = isinstance(each, Integral)  # which may be too large for a float
            if isinstance(each, Real) and not whole and not math.isfinite(each):
                expected = "a finite number"
            elif option.choices and each not in option.choices:
                expected = f"one of {', '.join(map(str, option.choices))}"
            elif option.minimum is not None and not each >= option.minimum:
                expected = f"{option.minimum} or more"
            elif option.maximum is not None and not each <= option.maximum:
                expected = f"{option.maximum} or less"
            else:
                continue
            raise InputError(f"{self.flag}: expected {expected}, not {each!r}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the type that a field is annotated with."""
    kinds = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in kinds)
    if get_origin(kind) is Sequence:
        return isinstance(value, tuple) and all(_fits(each, kinds[0]) for each in value)
    number = {int: Integral, float: Real}.get(kind)
    if number is not None:
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _named(kind: Any) -> str:
    """A type as messages have it: an enumeration by its values, others without their modules."""
    if (members := _enumeration(kind)) is not None:
        return f"one of {', '.join(member.value for member in members)}"
    return re.sub(r"(\w+\.)+", "", kind.__name__ if isinstance(kind, type) else str(kind))


def _enumeration(kind: Any) -> Any:
    kinds = (each for each in get_args(kind) or (kind,) if isinstance(each, EnumType))
    return next(kinds, None)


def _converted(value: Any, kind: Any) -> Any:
    """A sequence as a tuple, a number as Python's own, the value of an enumeration as its member, a
    path's text as a path.
    """
    if not isinstance(value, bool) and isinstance(value, Real):  # NumPy's are no JSON
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_converted(each, (get_args(kind) or (Any,))[0]) for each in value)
    kinds = get_args(kind) or (kind,)
    if isinstance(value, str) and Path in kinds and str not in kinds:
        return Path(value)
    members = _enumeration(kind)
    return next((member for member in members or () if member.value == value), value)


def declared(options: type) -> Mapping[str, Declared]:
    """The options of a dataclass, by its fields' names; a field without an Option is none."""
    return _declared(options)


@functools.cache
def _declared(options: Any) -> Mapping[str, Declared]:
    # The modules that declare options do not postpone annotations: to evaluate them all would take
    # a tenth of the time that the program's help takes.
    kinds = get_type_hints(options)
    return {
        each.name: Declared(each.name, kinds[each.name], each.default, each.metadata["option"])
        for each in fields(options)
        if "option" in each.metadata
    }


@dataclass(frozen=True, kw_only=True)
class Options:
    """A dataclass of options: it keeps sequences as tuples, and raises InputError for a value of
    another type or out of range.
    """

    def __post_init__(self) -> None:
        for name, option in declared(type(self)).items():
            value = option.hold(_converted(getattr(self, name), option.kind))
            object.__setattr__(self, name, value)
            option.check(value)

    def of(self, kind: type[T]) -> T:
        """The options that are of ``kind``, which this class has too."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(kind)})

    def to_json(self) -> dict[str, Any]:
        """The options as files have them, of JSON's types and tuples."""
        values = {each.recorded: getattr(self, name) for name, each in declared(type(self)).items()}
        return {name: _recorded(value) for name, value in values.items()}


def _recorded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_recorded, value))
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value) if isinstance(value, Path) else value


def takes(options: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Give a function of a dataclass the dataclass's fields for parameters, for type checkers
    too.
    """

    def decorate(work: Callable[[A], R]) -> Callable[P, R]:
        @functools.wraps(work)
        def function(*values: P.args, **named: P.kwargs) -> R:
            return work(options(*values, **named))

        kinds = get_type_hints(options)
        parameters = [
            parameter.replace(annotation=kinds[name])
            for name, parameter in inspect.signature(options).parameters.items()
        ]
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            parameters, return_annotation=inspect.signature(work).return_annotation
        )
        function.__doc__ = f"{inspect.getdoc(work)}\n\nArgs:\n{_described(options)}"
        return function

    return decorate


def _described(options: Any) -> str:
    """A line for each option: its name, what it is for, and a default that is found out later."""
    return "\n".join(
        f"    {name}: {each.option.help}"
        + (f" [default: {each.option.default}]" if isinstance(each.option.default, str) else "")
        for name, each in declared(options).items()
    )
