"""What is compared: the tables, their rows, and the cells these are made of. Data only; nothing
heavy is imported here.

A cell is one row at one bit-width with one seed. A row may stand in several tables (QuEST's own
settings are the baseline of every ablation): its cells are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.scheme import Granularity
from quest_deploy.models.registry import EMBEDDED, KNOWN_MODELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SEEDS = (0, 1, 2)
FLOAT_BITS = "fp32"
MAIN_BITS = ("w8a8", "w4a8", "w4a4")
ABLATION_BITS = "w4a4"
TRANSFORMER = "emoji-dit"
_FINETUNING = KNOWN_MODELS[EMBEDDED].defaults["finetuning"]
STEPS: int = _FINETUNING["temporal_steps"] + _FINETUNING["sensitive_steps"]
"""Optimizer steps of every finetuned row, however its stages share them: the models' own number."""
STATIC = {"buckets": 1, "granularity": Granularity.PER_TENSOR}
"""What integer toolchains do: one scale a tensor for all timesteps."""
FOUR_BITS: dict[str, Any] = {"eight_bit_layers": ()}
"""Of all layers but the first and the last."""
PAPER_TEMPORAL, PAPER_SENSITIVE = "QuEST's temporal layers", "QuEST's sensitive layers"
"""The names of QuEST's two sets of layers in a cell's notes on shares of the error."""
ATTENTION4 = {"attention_bits": 4, "softmax_bits": 8}
SENSITIVITY = {"samples": 4, "batch": 40}
"""Of ``measure_sensitivity``: rows, conditional and unconditional ones in turn."""


@dataclass(frozen=True)
class Schedule:
    """Timesteps to sample at.

    Attributes:
        scheduler: one of ``quest_deploy.models.schedulers.SCHEDULERS``.
        steps: how many.
        options: of the scheduler, in place of the model's.
    """

    scheduler: str = "ddim"
    steps: int = 20
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The schedule in words."""
        karras = " with Karras' sigmas" if self.options.get("use_karras_sigmas") else ""
        return f"{self.steps} steps of {self.scheduler.upper()}{karras}"


USUAL, FEWER, MORE = Schedule(), Schedule(steps=4), Schedule(steps=50)
"""Evenly spaced: equally wide buckets hold equally many steps, and quantiles are no other edges."""
KARRAS = Schedule("dpm++", 8, {"use_karras_sigmas": True})
"""What few steps are usually spent on: half of them below a tenth of the timesteps."""


@dataclass(frozen=True)
class Float:
    """The float model itself.

    Attributes:
        other_noise: whether its images are of another noise than the reference's, another one for
            each seed: how far a figure moves by chance. Else there is one cell.
    """

    other_noise: bool = False


@dataclass(frozen=True)
class ModelOpt:
    """Post-training quantization by NVIDIA's modelopt.

    Attributes:
        config: the name of one of its integer configurations, which are W8A8; at other bit-widths
            its layers, all but the first and the last, have those bits.
        rows: of the recorded trajectories, at all steps.
    """

    config: str
    rows: int


@dataclass(frozen=True)
class Nncf:
    """Post-training quantization by NNCF, run by OpenVINO.

    Attributes:
        rows: of the recorded trajectories, at all steps.
    """

    rows: int


@dataclass(frozen=True)
class Pipeline:
    """This package's stages; each mapping holds the keyword arguments that differ from the stage's
    defaults.

    Attributes:
        scheme: of ``Scheme.parse``; its layers of 8 bits are the model's unless told otherwise.
        quantiles: whether the buckets hold equally many of the recorded timesteps, instead of being
            equally wide; None for what the model's commands do.
        recorded_on: what is calibrated and finetuned on.
        calibration: of ``CalibrationOptions``.
        rotated: whether q, k and v of every head are rotated, see
            ``scripts.bench.methods.rotation``.
        low_rank: the rank of FP16 branches beside the layers that the sensitivity report picks, see
            ``quest_deploy.calibration.low_rank``; None for none.
        reconstruction: of ``ReconstructOptions`` (Q-Diffusion); None leaves the stage out.
        reported_layers: whether stage 2 trains what the sensitivity report picks.
        finetuning: of ``FinetuneOptions`` (QuEST), in place of the model's; None leaves the stage
            out.
    """

    scheme: Mapping[str, Any] = field(default_factory=dict)
    quantiles: bool | None = None
    recorded_on: Schedule = USUAL
    calibration: Mapping[str, Any] = field(default_factory=dict)
    rotated: bool = False
    low_rank: int | None = None
    reconstruction: Mapping[str, Any] | None = None
    reported_layers: bool = False
    finetuning: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Attributes:
        recipe: how its model is made.
        bits: the bit-widths at which it is measured.
        elsewhere: why it is not at the others.
        judged_on: the schedule of the images that are judged.
    """

    recipe: Float | ModelOpt | Nncf | Pipeline
    bits: tuple[str, ...] = (ABLATION_BITS,)
    elsewhere: str = ""
    judged_on: Schedule = USUAL


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


def _made_for(schedule: Schedule, buckets: int, *, quantiles: bool = False) -> Row:
    recipe = Pipeline(
        {"buckets": buckets}, quantiles=quantiles, recorded_on=schedule, finetuning={}
    )
    return Row(recipe, judged_on=schedule)


_QDIFF_START = Pipeline({**STATIC, "split_shortcuts": True}, calibration={"method": "l2.4"})
ROWS: dict[str, Row] = {
    "fp32": Row(Float(), (FLOAT_BITS,)),
    "fp32-redrawn": Row(Float(other_noise=True), (FLOAT_BITS,)),
    "ptq-minmax": Row(Pipeline(STATIC, calibration={"method": "minmax"}), MAIN_BITS),
    "ptq-l2.4": Row(_QDIFF_START, elsewhere="where Q-Diffusion starts; measured at W4A4 alone"),
    "ptq": Row(Pipeline(), MAIN_BITS),
    "ptq-four-bits": Row(Pipeline(FOUR_BITS)),
    "modelopt": Row(ModelOpt("INT8_DEFAULT_CFG", 256), MAIN_BITS),
    "nncf": Row(Nncf(16), ("w8a8",), "NNCF quantizes activations to 8 bits alone, with weights"),
    "qdiff": Row(
        Pipeline(_QDIFF_START.scheme, calibration=_QDIFF_START.calibration, reconstruction={}),
        ("w4a8", "w4a4"),
        "8-bit weights leave little to reconstruct; not measured",
    ),
    "quest": Row(Pipeline(finetuning={}), MAIN_BITS),
    "quest-k1": _quest({"buckets": 1}),
    "quest-k4": _quest({"buckets": 4}),
    "quest-k10": _quest({"buckets": 10}),
    "quest-equal10": Row(Pipeline({"buckets": 10}, quantiles=False, finetuning={})),
    "quest-four-bits": _quest(FOUR_BITS),
    "quest-stage1": _quest(stages=("temporal",), temporal_steps=STEPS),
    "quest-per-tensor": _quest({"granularity": Granularity.PER_TENSOR}),
    "quest-free-channel": _quest({"granularity": Granularity.PER_CHANNEL}),
    "quest-auto-layers": Row(Pipeline(reported_layers=True, finetuning={})),
    "quest-all-layers": _quest(sensitive_layers=("*",)),
    "quest-attention4": _quest(ATTENTION4),
    "quest-rotated": Row(Pipeline(rotated=True, finetuning={})),
    "quest-attention4-rotated": Row(Pipeline(ATTENTION4, rotated=True, finetuning={})),
    "quest-low-rank": Row(Pipeline(FOUR_BITS, low_rank=16, finetuning={})),
    "fp32-8-steps": Row(Float(), (FLOAT_BITS,), judged_on=KARRAS),
    "quest-8-steps": Row(Pipeline(finetuning={}), judged_on=KARRAS),
    "equal4-8-steps": _made_for(KARRAS, 4),
    "quantiles4-8-steps": _made_for(KARRAS, 4, quantiles=True),
    "quantiles8-8-steps": _made_for(KARRAS, 8, quantiles=True),
    "fp32-4-steps": Row(Float(), (FLOAT_BITS,), judged_on=FEWER),
    "quest-4-steps": Row(Pipeline(finetuning={}), judged_on=FEWER),
    "quest-k4-4-steps": Row(_quest({"buckets": 4}).recipe, judged_on=FEWER),
    "equal4-4-steps": _made_for(FEWER, 4),
    "quantiles4-4-steps": _made_for(FEWER, 4, quantiles=True),
    "fp32-50-steps": Row(Float(), (FLOAT_BITS,), judged_on=MORE),
    "equal1-50-steps": _made_for(MORE, 1),
    "equal10-50-steps": _made_for(MORE, 10),
    "equal50-50-steps": _made_for(MORE, 50),
}
_METHODS = {
    "fp32": "FP32",
    "fp32-redrawn": "FP32, other noise",
    "ptq-minmax": "PTQ, min-max",
    "ptq-l2.4": "PTQ, L2.4, split shortcuts",
    "ptq": "PTQ, MSE, smoothing, buckets",
    "modelopt": "PTQ, modelopt's INT8 configuration at these bits",
    "nncf": "PTQ, NNCF INT8",
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
            "quest-k4": "4 buckets",
            "quest-k10": "10 buckets",
            "quest": "20 buckets (baseline), one for each step",
        },
    ),
    Table(
        f"Layers that are finetuned, for {STEPS} steps",
        ABLATION_BITS,
        {
            "ptq": "none (PTQ)",
            "quest-stage1": "the temporal ones",
            "quest": "the temporal ones, then the paper's sensitive ones too (baseline)",
            "quest-auto-layers": "the temporal ones, then the sensitivity report's too",
            "quest-all-layers": "the temporal ones, then all",
        },
    ),
    Table(
        "Granularity of the activation scales",
        ABLATION_BITS,
        {
            "quest-per-tensor": "per tensor",
            "quest": "per tensor, smoothing scale folded into the weights (baseline)",
            "quest-free-channel": "per channel (not deployable as integers)",
        },
    ),
    Table(
        "Rotation of q, k and v",
        ABLATION_BITS,
        {
            "quest": "none, q, k and v in float (baseline)",
            "quest-rotated": "rotated, in float",
            "quest-attention4": "none, q, k and v at 4 bits, softmax at 8",
            "quest-attention4-rotated": "rotated, the same bits",
        },
    ),
    Table(
        "What the most sensitive layers have besides 4 bits",
        ABLATION_BITS,
        {
            "ptq-four-bits": "nothing, PTQ",
            "ptq": "8 bits, PTQ",
            "quest-four-bits": "nothing",
            "quest-low-rank": "branches of rank 16 in FP16, of the smoothed weights (SVDQuant)",
            "quest": "8 bits (baseline)",
        },
    ),
    Table(
        KARRAS.label,
        ABLATION_BITS,
        {
            "fp32-8-steps": "FP32",
            "quest-8-steps": "20 equal buckets, made for the usual 20 steps",
            "equal4-8-steps": "4 equal buckets, made for these steps",
            "quantiles4-8-steps": "4 buckets of two steps each",
            "quantiles8-8-steps": "8 buckets, one for each step",
        },
    ),
    Table(
        FEWER.label,
        ABLATION_BITS,
        {
            "fp32-4-steps": "FP32",
            "quest-4-steps": "20 equal buckets, made for the usual 20 steps",
            "quest-k4-4-steps": "4 equal buckets, made for the usual 20 steps",
            "equal4-4-steps": "4 equal buckets, one for each step, made for these steps",
        },
    ),
    Table(
        MORE.label,
        ABLATION_BITS,
        {
            "fp32-50-steps": "FP32",
            "equal1-50-steps": "1 bucket, made for these steps",
            "equal10-50-steps": "10 equal buckets, made for these steps",
            "equal50-50-steps": "50 equal buckets, one for each step, made for these steps",
        },
    ),
)


_OF_UNETS = ("ptq-l2.4", "qdiff")
"""What only UNets have: shortcuts to split, and blocks that Q-Diffusion reconstructs."""


@dataclass(frozen=True)
class Subject:
    """What is measured of a model: its tables at each of ``MAIN_BITS``, and the others."""

    main: tuple[Table, ...] = MAIN_TABLES
    ablations: tuple[Table, ...] = ABLATIONS

    @property
    def tables(self) -> tuple[Table, ...]:
        """All of them."""
        return self.main + self.ablations

    @property
    def rows(self) -> set[tuple[str, str]]:
        """What they show: a row's key, and bits."""
        return {(key, table.bits) for table in self.tables for key in table.rows}


SUBJECTS = {
    EMBEDDED: Subject(),
    TRANSFORMER: Subject(
        tuple(
            Table(
                bits.upper(),
                bits,
                {key: label for key, label in _METHODS.items() if key not in _OF_UNETS},
            )
            for bits in MAIN_BITS
        ),
        (
            Table(
                "Timestep buckets",
                ABLATION_BITS,
                {
                    "quest-k1": "1 bucket",
                    "quest-k4": "4 buckets of five steps each",
                    "quest-k10": "10 buckets of two steps each",
                    "quest-equal10": "10 equally wide buckets",
                    "quest": "20 buckets (baseline), one for each step",
                },
            ),
            *(
                table
                for table in ABLATIONS
                if table.rows.keys()
                & {"quest-stage1", "quest-per-tensor", "quest-rotated", "quest-low-rank"}
            ),
            Table(
                "4 steps",
                ABLATION_BITS,
                {
                    "fp32-4-steps": "FP32",
                    "quest-4-steps": "20 buckets, made for the usual 20 steps",
                    "quest-k4-4-steps": "4 buckets, made for the usual 20 steps",
                    "quantiles4-4-steps": "4 buckets, one for each step, made for these steps",
                },
            ),
        ),
    ),
}
"""The models by name. A transformer of flow matching has buckets of equally many of its steps."""
BUCKETS = tuple(
    table
    for table in ABLATIONS
    if table.title in ("Timestep buckets", KARRAS.label, FEWER.label, MORE.label)
)
"""The tables whose rows differ in their timestep buckets."""


def cells_of(row: str, bits: str, seeds: Iterable[int]) -> list[Cell]:
    """The cells that a table at ``bits`` shows in its row ``row``; none where the row is not
    measured there.
    """
    recipe = ROWS[row].recipe
    if isinstance(recipe, Float):
        return [Cell(row, FLOAT_BITS, seed) for seed in (seeds if recipe.other_noise else [0])]
    return [Cell(row, bits, seed) for seed in seeds] if bits in ROWS[row].bits else []


def all_cells(seeds: Iterable[int] = SEEDS, model: str = EMBEDDED) -> list[Cell]:
    """Every cell of a model once: the first seed of all tables before the second, so that an
    interrupted run shows every method.
    """
    shown = [
        cell
        for seed in seeds
        for table in SUBJECTS[model].tables
        for row in table.rows
        for cell in cells_of(row, table.bits, [seed])
    ]
    return list(dict.fromkeys(shown))
