"""What the papers claim, each as two rows of the comparison, and what the measured cells say to
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scripts.bench.methods.cells import (
    ABLATION_BITS,
    PAPER_SENSITIVE,
    PAPER_TEMPORAL,
    Cell,
    cells_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.bench.methods.cells import Subject
    from scripts.bench.methods.results import Result

FIGURES = {"frechet_distance": "{:.2f}", "feature_distance": "{:.4f}"}
"""What claims are judged by, lower is better: how real the images look, and how near they come to
FP32's.
"""


@dataclass(frozen=True)
class Claim:
    """That row ``better`` is better than row ``worse``; the bits are those of either row."""

    text: str
    better: str
    worse: str
    better_bits: str = ABLATION_BITS
    worse_bits: str = ABLATION_BITS


# QuEST: section 4 (its two findings, and training them in stages), tables 1 to 5. Q-Diffusion:
# section 3.2 (calibration by timestep, reconstruction).
CLAIMS = (
    Claim("At W4A4 QuEST beats min-max PTQ", "quest", "ptq-minmax"),
    Claim("At W4A4 QuEST beats Q-Diffusion", "quest", "qdiff"),
    Claim("QuEST at W4A4 beats Q-Diffusion at W4A8", "quest", "qdiff", worse_bits="w4a8"),
    Claim("At W4A8 QuEST beats Q-Diffusion", "quest", "qdiff", "w4a8", "w4a8"),
    Claim("At W4A8 Q-Diffusion beats min-max PTQ", "qdiff", "ptq-minmax", "w4a8", "w4a8"),
    Claim("At W4A4 reconstruction beats the PTQ that it starts from", "qdiff", "ptq-l2.4"),
    Claim("A scale for each timestep bucket beats one for all", "quest", "quest-k1"),
    Claim("Finetuning the temporal layers alone beats PTQ", "quest-stage1", "ptq"),
    Claim(
        "The temporal and the sensitive layers beat the temporal ones alone, at the same number of "
        "steps",
        "quest",
        "quest-stage1",
    ),
    Claim("The selected layers beat training all of them", "quest", "quest-all-layers"),
    Claim("Scales per channel beat scales per tensor", "quest-free-channel", "quest-per-tensor"),
    Claim("Ours: a smoothing scale beats scales per tensor alone", "quest", "quest-per-tensor"),
    Claim("Ours: the sensitivity report's layers beat the paper's", "quest-auto-layers", "quest"),
    Claim("Rotating q, k and v helps QuEST where they are floats", "quest-rotated", "quest"),
    Claim(
        "Rotating q, k and v helps QuEST where they have 4 bits",
        "quest-attention4-rotated",
        "quest-attention4",
    ),
    Claim(
        "A branch of low rank helps QuEST with four bits everywhere",
        "quest-low-rank",
        "quest-four-bits",
    ),
    Claim(
        "Ours: sensitive layers at 8 bits, in more bytes, beat branches of low rank",
        "quest",
        "quest-low-rank",
    ),
    Claim(
        "On 8 uneven steps, 4 buckets of two steps each beat 4 equally wide ones",
        "quantiles4-8-steps",
        "equal4-8-steps",
    ),
    Claim(
        "On 8 uneven steps, a bucket for each step beats 20 equal ones made for 20 even steps",
        "quantiles8-8-steps",
        "quest-8-steps",
    ),
    Claim(
        "On 4 even steps, buckets made for them beat the same ones made for 20",
        "equal4-4-steps",
        "quest-k4-4-steps",
    ),
    Claim("10 buckets of two steps each beat 10 equally wide ones", "quest-k10", "quest-equal10"),
    Claim(
        "On 4 steps, buckets made for them beat as many made for 20",
        "quantiles4-4-steps",
        "quest-k4-4-steps",
    ),
    Claim(
        "On 50 even steps, a bucket for each step beats one for all",
        "equal50-50-steps",
        "equal1-50-steps",
    ),
)


_SINCE_QUEST = {"quest-rotated", "quest-attention4-rotated", "quest-low-rank"}
NEWER = tuple(claim for claim in CLAIMS if _SINCE_QUEST & {claim.better, claim.worse})
"""Of what the best work at W4A4 since QuEST adds."""


def claims_of(subject: Subject) -> list[Claim]:
    """Those whose rows ``subject``'s tables show."""
    return [
        claim
        for claim in CLAIMS
        if {(claim.better, claim.better_bits), (claim.worse, claim.worse_bits)} <= subject.rows
    ]


@dataclass(frozen=True)
class Verdict:
    """What the cells say to a claim by one figure: both rows' means over the seeds that are
    measured, None where there is none, and a word.
    """

    better: float | None
    worse: float | None
    word: str


def judge(
    claim: Claim, figure: str, results: Mapping[Cell, Result | None], seeds: Sequence[int]
) -> Verdict:
    """The verdict by ``figure``, one of ``FIGURES``.

    "holds" where every seed of one row is better than every seed of the other, "on average only"
    where only the means are so ordered, and the other way round; nothing is concluded from one seed
    or from a row with a cell that is not computed.
    """
    better, worse = (
        [
            float(getattr(result.judgement, figure))
            for result in map(results.get, cells_of(row, bits, seeds))
            if result is not None
        ]
        for row, bits in ((claim.better, claim.better_bits), (claim.worse, claim.worse_bits))
    )
    return Verdict(_mean(better), _mean(worse), _verdict(better, worse, len(seeds)))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _verdict(better: Sequence[float], worse: Sequence[float], seeds: int) -> str:
    if min(len(better), len(worse)) < max(seeds, 2):
        return f"open: {min(len(better), len(worse))} of {max(seeds, 2)} seeds"
    if max(better) < min(worse):
        return "holds"
    if min(better) > max(worse):
        return "**the opposite holds**"
    return "on average only" if np.mean(better) < np.mean(worse) else "**not on average**"


def critical_groups(results: Mapping[Cell, Result | None], seeds: Sequence[int]) -> list[str]:
    """QuEST's claim that its two sets of layers are the ones that quantization hurts, judged by
    their share of the layers' error.

    The error is what each layer makes when it alone is quantized, at W4A4, every timestep bucket
    counting the same; the claim holds where both sets together make more than half of it.
    """
    of_seeds = [
        (cell.seed, results.get(cell))
        for cell in cells_of("quest-auto-layers", ABLATION_BITS, seeds)
    ]
    notes = {seed: result.notes for seed, result in of_seeds if result is not None}
    both = [
        note["error_shares"][PAPER_TEMPORAL] + note["error_shares"][PAPER_SENSITIVE]
        for note in notes.values()
    ]
    verdict = _verdict([1 - share for share in both], [0.5] * len(both), len(seeds))
    lines = [
        "QuEST's claim that its temporal and its sensitive layers make most of the error, at W4A4: "
        f"{verdict}."
    ]
    for seed, note in notes.items():
        ordered = sorted(note["error_shares"].items(), key=lambda entry: -entry[1])
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in ordered)
        picked = ", ".join(f"`{name}`" for name in note["sensitive_layers"])
        lines += [
            "",
            f"- seed {seed}: {shares}. `--layers auto` trains, besides the temporal layers, "
            f"{picked}",
        ]
    return lines
