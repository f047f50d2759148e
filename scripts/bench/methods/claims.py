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

    from scripts.bench.methods.results import Result

AIM = 0.9
"""The Fréchet distance that QuEST at W4A4 is to reach here, on the mean of the seeds."""


AIM_TEXT = f"Ours: QuEST at W4A4, deployable, q, k, v and softmax in float, reaches {AIM}"


@dataclass(frozen=True)
class Claim:
    """That row ``better`` has a lower Fréchet distance than row ``worse``; the bits are those of
    either row.
    """

    text: str
    better: str
    worse: str
    better_bits: str = ABLATION_BITS
    worse_bits: str = ABLATION_BITS


# QuEST: section 4 (its two findings, and training them in stages), tables 1 to 5. Q-Diffusion:
# sections 3.2 (calibration by timestep, reconstruction) and 3.3 (split shortcuts).
CLAIMS = (
    Claim("At W4A4 QuEST beats min-max PTQ", "quest", "ptq-minmax"),
    Claim("At W4A4 QuEST beats Q-Diffusion", "quest", "qdiff"),
    Claim("QuEST at W4A4 beats Q-Diffusion at W4A8", "quest", "qdiff", worse_bits="w4a8"),
    Claim("At W4A8 QuEST beats Q-Diffusion", "quest", "qdiff", "w4a8", "w4a8"),
    Claim("At W4A8 Q-Diffusion beats min-max PTQ", "qdiff", "ptq-minmax", "w4a8", "w4a8"),
    Claim(
        "At W4A4 reconstruction beats the L2.4 PTQ with split shortcuts that it starts from",
        "qdiff",
        "ptq-split",
    ),
    Claim("A scale for each timestep bucket beats one for all", "quest", "quest-k1"),
    Claim("50 buckets beat 20", "quest-k50", "quest"),
    Claim("Finetuning the temporal layers alone beats PTQ", "quest-stage1", "ptq-folded"),
    Claim("Finetuning the sensitive layers alone beats PTQ", "quest-stage2", "ptq-folded"),
    Claim(
        "Both stages beat the temporal one alone, at the same number of steps",
        "quest-frozen",
        "quest-stage1",
    ),
    Claim(
        "Both stages beat the sensitive one alone, at the same number of steps",
        "quest-frozen",
        "quest-stage2",
    ),
    Claim("Temporal layers first beats sensitive layers first", "quest-frozen", "quest-reversed"),
    Claim(
        "Ours: training the temporal layers on in stage 2 beats freezing them",
        "quest",
        "quest-frozen",
    ),
    Claim("The selected layers beat training all of them", "quest", "quest-all-layers"),
    Claim("Scales per-channel beat scales per tensor", "quest-free-channel", "quest-per-tensor"),
    Claim(
        "Splitting the shortcuts at the concatenation helps QuEST", "quest-split-shortcuts", "quest"
    ),
    Claim(
        "QuEST started from Q-Diffusion beats QuEST started from PTQ, both with split shortcuts",
        "quest-from-qdiff",
        "quest-split-shortcuts",
    ),
)


def judged(
    results: Mapping[Cell, Result | None], seeds: Sequence[int]
) -> list[tuple[str, str, str, str]]:
    """Each claim with both rows' mean Fréchet distance and the verdict.

    "holds" where it does for every pair of seeds, "holds on average" where only the means are so
    ordered, and the other way round; nothing is concluded from one seed or from a row with a cell
    that is not run.
    """
    rows = []
    for claim in CLAIMS:
        better = _distances(claim.better, claim.better_bits, results, seeds)
        worse = _distances(claim.worse, claim.worse_bits, results, seeds)
        shown = [f"{np.mean(values):.2f}" if values else "not run" for values in (better, worse)]
        rows.append((claim.text, shown[0], shown[1], _verdict(better, worse, len(seeds))))
    quest = _distances("quest", ABLATION_BITS, results, seeds)
    reached = _verdict(quest, [AIM] * len(quest), len(seeds))
    if not reached.startswith("open"):
        reached = "reached" if np.mean(quest) <= AIM else "**missed**"
    rows.append((AIM_TEXT, f"{np.mean(quest):.2f}" if quest else "not run", str(AIM), reached))
    return rows


def _distances(
    row: str, bits: str, results: Mapping[Cell, Result | None], seeds: Sequence[int]
) -> list[float]:
    """Of the seeds that are run."""
    of_seeds = [results.get(cell) for cell in cells_of(row, bits, seeds)]
    return [result.quality.frechet_distance for result in of_seeds if result is not None]


def _verdict(better: Sequence[float], worse: Sequence[float], seeds: int) -> str:
    if min(len(better), len(worse)) < max(seeds, 2):
        return f"open: {min(len(better), len(worse))} of {max(seeds, 2)} seeds"
    if max(better) < min(worse):
        return "holds"
    if min(better) > max(worse):
        return "**does not hold: the opposite does**"
    return "on average only" if np.mean(better) < np.mean(worse) else "**does not hold on average**"


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
    notes = {
        seed: result.notes
        for seed, result in of_seeds
        if result is not None and "error_shares" in result.notes
    }
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
