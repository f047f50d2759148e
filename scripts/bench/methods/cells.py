"""What is compared: the tables, their rows, and the cells these are made of. Data only; nothing
heavy is imported here.

A cell is one row at one bit-width with one seed. A row may stand in several tables (QuEST's own
settings are the baseline of every ablation): its cells are computed once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.scheme import Granularity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SEEDS = (0, 1, 2)
FLOAT_BITS = "fp32"
MAIN_BITS = ("w8a8", "w4a8", "w4a4")
ABLATION_BITS = "w4a4"
STEPS = 800
"""Optimizer steps of every finetuned row, however its stages share them."""
STATIC = {"buckets": 1, "granularity": Granularity.PER_TENSOR}
"""What integer toolchains do: one scale a tensor for all timesteps."""
PAPER_TEMPORAL, PAPER_SENSITIVE = "QuEST's temporal layers", "QuEST's sensitive layers"
"""The names of QuEST's two sets of layers in a cell's notes on shares of the error."""
ATTENTION8 = {"attention_bits": 8, "softmax_bits": 8}


@dataclass(frozen=True)
class Float:
    """The float model itself. Nothing is drawn at random to make it, so it has one cell."""


@dataclass(frozen=True)
class ModelOpt:
    """Post-training quantization by NVIDIA's modelopt with one of its own configurations, as it
    ships.
    """

    config: str


@dataclass(frozen=True)
class Pipeline:
    """This package's stages; each mapping holds the keyword arguments that differ from the stage's
    defaults.

    Attributes:
        scheme: of ``Scheme.parse``.
        calibration: of ``CalibrationOptions``.
        reconstruction: of ``ReconstructOptions`` (Q-Diffusion); None leaves the stage out.
        sensitivity: of ``measure_sensitivity``, whose report then picks what stage 2 trains; None
            leaves that to ``finetuning``.
        finetuning: of ``FinetuneOptions`` (QuEST); None leaves the stage out.
    """

    scheme: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    reconstruction: Mapping[str, Any] | None = None
    sensitivity: Mapping[str, Any] | None = None
    finetuning: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Attributes:
        recipe: how its model is made.
        bits: the bit-widths at which it is measured.
        elsewhere: why it is not at the others.
    """

    recipe: Float | ModelOpt | Pipeline
    bits: tuple[str, ...] = (ABLATION_BITS,)
    elsewhere: str = ""


@dataclass(frozen=True)
class Cell:
    """One row at one bit-width with one seed, which draws the calibration data, the values kept of
    it, and the batches.
    """

    row: str
    bits: str
    seed: int

    @property
    def name(self) -> str:
        """The stem of the cell's file, such as "w4a4-quest-seed0"."""
        return f"{self.bits}-{self.row}-seed{self.seed}"


@dataclass(frozen=True)
class Table:
    """A table: its title, the bit-width its rows are shown at, and the label of each row by its key
    in ``ROWS``.
    """

    title: str
    bits: str
    rows: Mapping[str, str]


def _quest(scheme: Mapping[str, Any] | None = None, **finetuning: Any) -> Row:
    return Row(Pipeline(scheme or {}, finetuning=finetuning))


def _qdiff(**scheme: Any) -> Row:
    return Row(
        Pipeline(
            {**STATIC, "split_shortcuts": True, **scheme}, {"method": "l2.4"}, reconstruction={}
        )
    )


_NO_INTEGERS = "modelopt's integer configurations are W8A8"
ROWS: dict[str, Row] = {
    "fp32": Row(Float(), (FLOAT_BITS,)),
    "ptq-minmax": Row(Pipeline(STATIC, {"method": "minmax"}), MAIN_BITS),
    "ptq-l2.4": Row(Pipeline(STATIC, {"method": "l2.4"}), MAIN_BITS),
    "modelopt": Row(ModelOpt("INT8_DEFAULT_CFG"), ("w8a8",), _NO_INTEGERS),
    "modelopt-smoothquant": Row(ModelOpt("INT8_SMOOTHQUANT_CFG"), ("w8a8",), _NO_INTEGERS),
    "qdiff": dataclasses.replace(_qdiff(), bits=MAIN_BITS),
    "quest": Row(Pipeline(finetuning={}), MAIN_BITS),
    "quest-k1": _quest({"buckets": 1}),
    "quest-k5": _quest({"buckets": 5}),
    "quest-k10": _quest({"buckets": 10}),
    "quest-k50": _quest({"buckets": 50}),
    "quest-stage1": _quest(stages=("temporal",), temporal_steps=STEPS),
    "quest-stage2": _quest(stages=("sensitive",), sensitive_steps=STEPS),
    "quest-frozen": _quest(carry_temporal=False),
    "quest-reversed": _quest(stages=("sensitive", "temporal")),
    "quest-per-tensor": _quest({"granularity": Granularity.PER_TENSOR}),
    "quest-free-channel": _quest({"granularity": Granularity.PER_CHANNEL}),
    "quest-auto-layers": Row(Pipeline(sensitivity={"samples": 8, "batch": 16}, finetuning={})),
    "quest-all-layers": _quest(sensitive_layers=("*",)),
    "quest-attention8": _quest(ATTENTION8),
    "quest-attention4": _quest({"attention_bits": 4, "softmax_bits": 8}),
    "quest-split-shortcuts": _quest({"split_shortcuts": True}),
    "qdiff-attention8": _qdiff(**ATTENTION8),
    "quest-from-qdiff": Row(
        Pipeline({"split_shortcuts": True}, {"method": "l2.4"}, reconstruction={}, finetuning={})
    ),
    "ptq-folded": Row(Pipeline()),
    "ptq-split": Row(Pipeline({**STATIC, "split_shortcuts": True}, {"method": "l2.4"})),
    "qdiff-folded": Row(Pipeline({"split_shortcuts": True}, {"method": "l2.4"}, reconstruction={})),
}
_METHODS = {
    "fp32": "FP32",
    "ptq-minmax": "PTQ, min-max",
    "ptq-l2.4": "PTQ, L2.4",
    "modelopt": "PTQ, modelopt INT8",
    "modelopt-smoothquant": "PTQ, modelopt INT8 SmoothQuant",
    "qdiff": "Q-Diffusion",
    "quest": "QuEST",
}
MAIN_TABLES = tuple(Table(bits.upper(), bits, _METHODS) for bits in MAIN_BITS)
ABLATIONS = (
    Table(
        "Timestep buckets",
        ABLATION_BITS,
        {
            "quest-k1": "1 bucket",
            "quest-k5": "5",
            "quest-k10": "10",
            "quest": "20 (baseline)",
            "quest-k50": "50 (the judged 20 steps visit 20 of them)",
        },
    ),
    Table(
        f"Stages ({STEPS} steps in every finetuned row)",
        ABLATION_BITS,
        {
            "ptq-folded": "none (PTQ)",
            "quest-stage1": "stage 1 only",
            "quest-stage2": "stage 2 only",
            "quest-frozen": "stage 1, then stage 2 with the temporal layers frozen (as published)",
            "quest": "stage 1, then stage 2 training the temporal layers on (baseline)",
            "quest-reversed": "stage 2, then stage 1",
        },
    ),
    Table(
        "Granularity of the activation scales",
        ABLATION_BITS,
        {
            "quest-per-tensor": "per tensor",
            "quest": "per tensor, smoothing scale folded into the weights (baseline)",
            "quest-free-channel": "free per channel (not deployable as integers)",
        },
    ),
    Table(
        "Layers whose weights stage 2 trains",
        ABLATION_BITS,
        {
            "quest": "the paper's selection (baseline)",
            "quest-auto-layers": "the sensitivity report's",
            "quest-all-layers": "all",
        },
    ),
    Table(
        "Bits of the attention products",
        ABLATION_BITS,
        {
            "quest": "float (baseline)",
            "quest-attention8": "q, k, v and softmax at 8",
            "quest-attention4": "q, k, v at 4, softmax at 8",
            "qdiff-attention8": "q, k, v and softmax at 8, Q-Diffusion",
        },
    ),
    Table(
        "Shortcut convolutions behind a concatenation",
        ABLATION_BITS,
        {
            "quest": "one quantizer (baseline)",
            "quest-split-shortcuts": "one for each half, as Q-Diffusion's",
        },
    ),
    Table(
        "What finetuning starts from",
        ABLATION_BITS,
        {
            "ptq-folded": "PTQ, MSE, not finetuned",
            "quest": "PTQ, MSE, finetuned (baseline)",
            "qdiff-folded": "Q-Diffusion (L2.4, split shortcuts, reconstructed) in 20 buckets, not "
            "finetuned",
            "quest-from-qdiff": "the same, finetuned",
            "ptq-split": "static PTQ, L2.4, split shortcuts: what static Q-Diffusion starts from",
            "qdiff": "static Q-Diffusion, not finetuned",
        },
    ),
)


def cells_of(row: str, bits: str, seeds: Iterable[int]) -> list[Cell]:
    """The cells that a table at ``bits`` shows in its row ``row``; none where the row is not
    measured there.
    """
    if isinstance(ROWS[row].recipe, Float):
        return [Cell(row, FLOAT_BITS, 0)]
    return [Cell(row, bits, seed) for seed in seeds] if bits in ROWS[row].bits else []


def all_cells(seeds: Iterable[int] = SEEDS) -> list[Cell]:
    """Every cell once: the first seed of all tables before the second, so that an interrupted run
    shows every method.
    """
    shown = [
        cell
        for seed in seeds
        for table in (*MAIN_TABLES, *ABLATIONS)
        for row in table.rows
        for cell in cells_of(row, table.bits, [seed])
    ]
    return list(dict.fromkeys(shown))
