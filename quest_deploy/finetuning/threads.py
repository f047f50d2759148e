"""How many threads finetuning takes: a small model is faster on few."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def at_most_threads(most: int | None) -> Iterator[None]:
    """Let torch compute with at most so many threads; None for as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
