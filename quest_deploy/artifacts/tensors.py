"""Reads safetensors files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from quest_deploy.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path


def open_tensors(path: Path, framework: str = "numpy") -> Any:
    """Open a file, as a context manager; its tensors are read when they are asked for.

    Raises:
        InputError: it is a pipe, a device or a folder: the library would wait for it, or read
            without end.
        OSError, SafetensorError: it cannot be opened, or is damaged.
    """
    open_regular(path).close()
    return safe_open(path, framework=framework)


def read_tensors(path: Path, framework: str = "numpy") -> dict[str, Any]:
    """All tensors of a file, by name; raises what :func:`open_tensors` does."""
    with open_tensors(path, framework) as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
