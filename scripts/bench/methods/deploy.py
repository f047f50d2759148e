"""Which bits one should deploy: quality beside size and speed, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.bench.methods.cells import MAIN_BITS, cells_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.bench.methods.cells import Cell
    from scripts.bench.methods.results import Result

    Results = Mapping[Cell, Result | None]
    Speeds = Mapping[str, Any] | None

METHOD = "quest"
SAME_SIZE, SAME_SPEED = 1.02, 1.05
"""Ratios below which two sizes, or two speeds, count as equal."""


@dataclass(frozen=True)
class Choice:
    """What one gets at a bit-width; means over the seeds.

    Attributes:
        speedups: over FP32 by (backend, batch); empty where none is measured.
        engine_bytes: of the engine's files by backend, and of FP32's.
    """

    bits: str
    frechet_distance: float
    top1: float
    top5: float
    psnr: float
    payload_bytes: float
    speedups: dict[tuple[str, int], float]
    engine_bytes: dict[str, tuple[int, int]]

    @property
    def speed(self) -> float:
        """The geometric mean of all speeds over FP32; 1 where none is measured."""
        return float(np.exp(np.log(list(self.speedups.values())).mean())) if self.speedups else 1.0


@dataclass(frozen=True)
class Limit:
    """What FP32 itself reaches: its Fréchet distance, and the highest of other noise."""

    fp32: float
    highest: float


def missing(results: Results, seeds: Sequence[int]) -> list[str]:
    """The cells that an answer needs and that are not computed."""
    needed = [
        *cells_of("fp32", "fp32", seeds),
        *cells_of("fp32-redrawn", "fp32", seeds),
        *(cell for bits in MAIN_BITS for cell in cells_of(METHOD, bits, seeds)),
    ]
    return [cell.name for cell in needed if results.get(cell) is None]


def choices(results: Results, seeds: Sequence[int], speeds: Speeds) -> list[Choice]:
    """One for each bit-width that has a result."""
    found = []
    for bits in MAIN_BITS:
        measured = _of(results, METHOD, bits, seeds)
        if not measured:
            continue
        by_backend = {} if speeds is None else speeds["bits"].get(bits, {})
        judged = [result.judgement for result in measured]
        found.append(
            Choice(
                bits,
                _mean([judgement.frechet_distance for judgement in judged]),
                _mean([judgement.top1 for judgement in judged]),
                _mean([judgement.top5 for judgement in judged]),
                _mean([result.quality.psnr or np.inf for result in measured]),
                _mean([result.payload_bytes for result in measured]),
                {
                    (backend, int(batch)): ratio
                    for backend, figures in by_backend.items()
                    for batch, ratio in figures["speedup_over_fp32"].items()
                },
                {
                    backend: (figures["engine_bytes"], figures["fp32_bytes"])
                    for backend, figures in by_backend.items()
                },
            )
        )
    return found


def limit(results: Results, seeds: Sequence[int]) -> Limit:
    """What counts as FP32's quality; both cells' rows must be measured."""
    own, redrawn = (
        [r.judgement.frechet_distance for r in _of(results, row, "fp32", seeds)]
        for row in ("fp32", "fp32-redrawn")
    )
    return Limit(own[0], max(own + redrawn))


def best_of(candidates: Sequence[Choice]) -> Choice:
    """The smallest of ``candidates``; of equal sizes the fastest, of equal speeds the nearest to
    real pictures.
    """
    smallest = min(choice.payload_bytes for choice in candidates)
    small = [c for c in candidates if c.payload_bytes <= SAME_SIZE * smallest]
    fastest = max(choice.speed for choice in small)
    fast = [c for c in small if SAME_SPEED * c.speed >= fastest]
    return min(fast, key=lambda choice: choice.frechet_distance)


def answer(results: Results, seeds: Sequence[int], speeds: Speeds) -> list[str]:
    """The answer in sentences, each of them from the figures."""
    if absent := missing(results, seeds):
        return [f"Open: not computed yet: {', '.join(f'`{name}`' for name in absent)}."]
    found, bound = choices(results, seeds, speeds), limit(results, seeds)
    as_good = [choice for choice in found if choice.frechet_distance <= bound.highest]
    lines = [
        f"FP32's Fréchet distance is {bound.fp32:.2f}, and other noise brings it up to "
        f"{bound.highest:.2f}: what stays below cannot be told from FP32 by it. QuEST reaches "
        + ", ".join(f"{c.frechet_distance:.2f} at {c.bits.upper()}" for c in found)
        + "."
    ]
    if as_good:
        best = best_of(as_good)
        lines.append(
            f"**Deploy {best.bits.upper()}**: of the bit-widths that stay below, it is the "
            "smallest, of equal sizes the fastest, and of equal speeds the nearest to real "
            "pictures."
        )
    else:
        best = min(found, key=lambda choice: choice.frechet_distance)
        lines.append(f"**None stays below**; {best.bits.upper()} comes nearest.")
    lines += [_beside(other, best) for other in found if other is not best]
    if speeds is None:
        lines.append("Speeds are not measured yet, and count as equal.")
    return lines


def _beside(other: Choice, best: Choice) -> str:
    size, speed = other.payload_bytes / best.payload_bytes, other.speed / best.speed
    return (
        f"{other.bits.upper()} beside it: {_ratio(size, SAME_SIZE, 'size')}, "
        f"{_ratio(speed, SAME_SPEED, 'speed')}, Fréchet distance "
        f"{other.frechet_distance - best.frechet_distance:+.2f}, PSNR "
        f"{other.psnr - best.psnr:+.1f} dB."
    )


def _ratio(ratio: float, same: float, what: str) -> str:
    return f"equal {what}" if 1 / same <= ratio <= same else f"{ratio:.2f}x the {what}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _of(results: Results, row: str, bits: str, seeds: Sequence[int]) -> list[Result]:
    found = (results.get(cell) for cell in cells_of(row, bits, seeds))
    return [result for result in found if result is not None]
