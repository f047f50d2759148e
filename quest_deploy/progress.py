"""Progress of long work: one protocol, from the innermost loop to the command line."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """Is told that ``done`` of ``total`` steps of ``phase`` are done; ``detail`` is what else to
    show of the last one. ``print`` is one.
    """

    def __call__(self, phase: str, done: int, total: int, detail: str = "", /) -> None: ...


@runtime_checkable
class Display(Protocol):
    """Shows each stage by itself, as the command line does."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """The progress of the stage that is called ``title``, while the context is open."""


def no_progress(phase: str, done: int, total: int, detail: str = "", /) -> None:
    """Show nothing."""


def named(progress: Progress, name: str) -> Progress:
    """Return what calls every phase ``name``."""

    def renamed(phase: str, done: int, total: int, detail: str = "", /) -> None:
        progress(name, done, total, detail)

    return renamed


def progress_of(shown: Progress | Display, title: str) -> AbstractContextManager[Progress]:
    """Where the stage called ``title`` reports to while the context is open."""
    return shown.progress(title) if isinstance(shown, Display) else nullcontext(shown)
