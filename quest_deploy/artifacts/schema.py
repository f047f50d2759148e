"""How files and settings are validated: pydantic checks the declared types, coerces nothing and
refuses unknown keys; what is wrong is an InputError.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from quest_deploy.errors import InputError
from quest_deploy.files import sha256_of_json

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
LISTED = 5
"""How many problems a message names."""
Positive = Annotated[int, Field(gt=0)]


def one_of(*values: int) -> AfterValidator:
    """That an integer is one of ``values``; a ``Literal`` of them would take 4.0 for 4."""

    def check(value: int) -> int:
        if value not in values:
            raise ValueError(f"expected {' or '.join(map(str, values))}, found {value}")
        return value

    return AfterValidator(check)


Bits = Annotated[int, one_of(4, 8)]
WeightBits = Annotated[int, one_of(4, 7, 8)]
"""Two weights of 7 bits times any two activations of 8 fit 16 bits, in which x86's integer kernels
without VNNI add them.
"""


def validated(label: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass validate its fields whenever one is made; ``label`` opens its
    errors. Its ``__post_init__`` raises ValueError for what types cannot say.
    """

    def decorate(cls: type[T]) -> type[T]:
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        config = ConfigDict(strict=True, extra="forbid")
        checked: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(cls)
        make = checked.__init__

        @functools.wraps(make)
        def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:  # by name, so that errors name the field
                make(self, **dict(zip(names, args, strict=False)), **kwargs)
            except ValidationError as e:
                raise InputError(f"{label}: {_problems(e)}") from e

        checked.__init__ = checked_init
        return checked  # type: ignore[no-any-return]

    return decorate


def parse(kind: type[T], value: Any, what: str, repair: str = "") -> T:
    """Read a JSON value as ``kind``.

    Raises:
        InputError: it is anything else; the message begins with ``what`` and ends with
            ``repair``, what to do.
    """
    try:  # as JSON, where alone an array may stand for a tuple and a text for an enumeration's
        return TypeAdapter(kind).validate_json(json.dumps(value))
    except ValidationError as e:
        raise _refusal(what, _problems(e), repair) from e
    except InputError as e:  # of a part that is read by its own function
        raise _refusal(what, str(e), repair) from e


def parse_document(
    kind: type[T],
    value: Any,
    form: str,
    version: int,
    what: str,
    repair: str = "",
    *,
    sealed: bool = False,
) -> T:
    """As :func:`parse`, a JSON object that says what it is: ``format`` and ``version`` besides
    the fields of ``kind``, and where it is ``sealed`` its hash, as
    :func:`quest_deploy.files.sealed` adds it.
    """
    if not isinstance(value, dict) or value.get("format") != form:
        raise _refusal(what, f"expected a {form}, found something else", repair)
    if value.get("version") != version:
        found = value.get("version")
        raise _refusal(what, f"expected a {form} of version {version}, found {found!r}", repair)
    if sealed and "sha256" not in value:
        raise _refusal(what, "it has no sha256: an earlier version wrote it, or an editor", repair)
    about = {"format", "version", "sha256"} if sealed else {"format", "version"}
    found = parse(kind, {k: v for k, v in value.items() if k not in about}, what, repair)
    content = {k: v for k, v in value.items() if k != "sha256"}
    if sealed and value.get("sha256") != sha256_of_json(content):
        raise _refusal(what, "it was edited", repair)
    return found


def _refusal(what: str, problem: str, repair: str) -> InputError:
    return InputError("; ".join(filter(None, (f"{what}: {problem}", repair))))


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    listed = [_problem(e["type"], e["loc"], e["msg"], e["input"]) for e in found[:LISTED]]
    return "; ".join(listed + ([f"and {len(found) - LISTED} more"] if found[LISTED:] else []))


def _problem(kind: str, place: tuple[int | str, ...], message: str, value: Any) -> str:
    at = ".".join(map(str, place))
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {at}"
    if kind == "missing":
        return f"{at} is missing"
    expected = message.removeprefix("Value error, ").replace("Input should be", "expected")
    found = "" if kind == "value_error" else f", found {repr(value)[:60]}"
    return f"{at}{': ' if at else ''}{expected}{found}"
