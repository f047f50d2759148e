"""Protocol buffers' text format, as far as Triton's model configurations need it."""

from __future__ import annotations

import json
from typing import Any


class Word(str):
    """A value that is written without quotes: a constant of an enumeration."""

    __slots__ = ()


def pbtxt(message: dict[str, Any]) -> str:
    """The fields of ``message``: numbers, truth values, strings, words, messages (dict), and lists
    of them for repeated fields.
    """
    return "\n".join(_lines(message, "")) + "\n"


def _lines(message: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(entry, dict) for entry in value):
            lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]")
            continue
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                lines += [f"{indent}{name} {{", *_lines(entry, indent + "  "), f"{indent}}}"]
            else:
                lines.append(f"{indent}{name}: {_scalar(entry)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (Word, int, float)) else json.dumps(value)
