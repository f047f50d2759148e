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
class Limits:
    """What FP32 reaches, on the noise of all rows first and then on others, [N] each; what is worse
    on that noise by no more than other noise moves FP32 itself cannot be told from it.
    """

    frechet_distances: list[float]
    top5: list[float]

    def allow(self, choice: Choice) -> bool:
        """Whether ``choice`` cannot be told from FP32, by both figures."""
        worse = choice.frechet_distance - self.frechet_distances[0]
        less = self.top5[0] - choice.top5
        return worse <= moved(self.frechet_distances) and less <= moved(self.top5)


def moved(values: list[float]) -> float:
    """How far other noise moves a figure of FP32 at most, from the first of ``values`` [N]."""
    return max(abs(value - values[0]) for value in values)


def missing(results: Results, seeds: Sequence[int]) -> list[str]:
    """The rows that an answer needs with cells that are not computed, such as "w4a4-quest"."""
    needed = [
        *cells_of("fp32", "fp32", seeds),
        *cells_of("fp32-redrawn", "fp32", seeds),
        *(cell for bits in MAIN_BITS for cell in cells_of(METHOD, bits, seeds)),
    ]
    absent = (f"{cell.bits}-{cell.row}" for cell in needed if results.get(cell) is None)
    return list(dict.fromkeys(absent))


def choices(results: Results, seeds: Sequence[int], speeds: Speeds) -> list[Choice]:
    """One for each bit-width that has a result."""
    found = []
    for bits in MAIN_BITS:
        measured = measured_of(results, METHOD, bits, seeds)
        if not measured:
            continue
        by_backend = {} if speeds is None else speeds["bits"].get(bits, {})
        judged = [result.judgement for result in measured]
        found.append(
            Choice(
                bits,
                mean([judgement.frechet_distance for judgement in judged]),
                mean([judgement.top1 for judgement in judged]),
                mean([judgement.top5 for judgement in judged]),
                mean([result.quality.psnr or np.inf for result in measured]),
                mean([result.payload_bytes for result in measured]),
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


def limits(results: Results, seeds: Sequence[int]) -> Limits:
    """Of the float model's cells."""
    judged = [
        result.judgement
        for row in ("fp32", "fp32-redrawn")
        for result in measured_of(results, row, "fp32", seeds)
    ]
    return Limits([j.frechet_distance for j in judged], [j.top5 for j in judged])


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
    found, fp32 = choices(results, seeds, speeds), limits(results, seeds)
    as_good = [choice for choice in found if fp32.allow(choice)]
    distances, top5 = fp32.frechet_distances, fp32.top5
    lines = [
        f"FP32 has a Fréchet distance of {distances[0]:.2f} and the prompt among the five nearest "
        f"in {top5[0]:.1%}; other noise moves them by up to {moved(distances):.2f} and "
        f"{100 * moved(top5):.1f} points. What is worse by no more than that, by both, cannot be "
        "told from FP32.",
        "QuEST has "
        + ", ".join(
            f"{choice.frechet_distance:.2f} and {choice.top5:.1%} at {choice.bits.upper()}"
            for choice in found
        )
        + ".",
    ]
    if as_good:
        best = best_of(as_good)
        lines.append(
            f"**Deploy {best.bits.upper()}**: of the bit-widths that are no worse, it is the "
            "smallest, of equal sizes the fastest, and of equal speeds the nearest to real "
            "pictures."
        )
    else:
        best = min(found, key=lambda choice: choice.frechet_distance)
        lines.append(
            f"**Each is worse than FP32**; {best.bits.upper()} is the nearest to real pictures."
        )
    lines += [_beside(other, best) for other in found if other is not best]
    if speeds is None:
        lines.append("Speeds are not measured yet, and count as equal.")
    return lines


def _beside(other: Choice, best: Choice) -> str:
    size, speed = other.payload_bytes / best.payload_bytes, other.speed / best.speed
    return (
        f"{other.bits.upper()} beside it: {_ratio(size, SAME_SIZE, 'size')}, "
        f"{_ratio(speed, SAME_SPEED, 'speed')}, Fréchet distance "
        f"{other.frechet_distance - best.frechet_distance:+.2f}, top 5 "
        f"{100 * (other.top5 - best.top5):+.1f} points, PSNR "
        f"{other.psnr - best.psnr:+.1f} dB."
    )


def _ratio(ratio: float, same: float, what: str) -> str:
    return f"equal {what}" if 1 / same <= ratio <= same else f"{ratio:.2f}x the {what}"


def mean(values: Sequence[float]) -> float:
    """The mean of ``values`` [N]."""
    return float(np.mean(values))


def measured_of(results: Results, row: str, bits: str, seeds: Sequence[int]) -> list[Result]:
    """The results that a row has at ``bits``."""
    found = (results.get(cell) for cell in cells_of(row, bits, seeds))
    return [result for result in found if result is not None]
