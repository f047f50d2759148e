"""What each stage reports: returned by its function, printed by --json, kept in the manifest."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Calibration(TypedDict):
    """The calibrated checkpoint; the shares, from 0 to 1, are of what is at 4 bits. ``branches`` is
    how many layers have a branch of low rank, where any has one.
    """

    layers: int
    sites: int
    buckets: int
    weights_at_4_bits: float
    macs_at_4_bits: float
    checkpoint_bytes: int
    branches: NotRequired[int]


# A key that is a keyword of Python.
_From = TypedDict("_From", {"from": str})


class Import(Calibration, _From):
    """The imported checkpoint; ``in_float`` says by quantizer why it computes in float."""

    recalibrated: bool
    in_float: dict[str, str]


class Folding(Calibration):
    """The checkpoint of the workspace ``base`` with LoRAs folded in: how many layers they changed,
    and what made it, as ``evaluate`` calls that.
    """

    base: str
    method: str
    changed_layers: int


class LayerSensitivity(TypedDict):
    """How much one layer hurts when it alone is quantized."""

    layer: str
    group: str
    mse: float
    relative_mse: float


class Sensitivity(TypedDict):
    """All layers, and those that finetuning's sensitive stage would train."""

    samples: int
    seconds: float
    selected: list[str]
    layers: list[LayerSensitivity]


class Finetuning(TypedDict):
    """The finetuned checkpoint; ``seconds`` are of the last run, ``final_loss`` is the mean over
    its last 50 steps.
    """

    steps: int
    seconds: float
    final_loss: float | None
    checkpoint_bytes: int


class Export(TypedDict):
    """The portable graph; ``float_sites`` says by quantizer why it computes in float."""

    method: str
    sites: int
    float_sites: NotRequired[dict[str, str]]  # records of earlier versions have none
    layers: int
    buckets: int
    bytes: int
    fp32_weight_bytes: int


class Reference(TypedDict):
    """The reference records; ``largest_sensitivity`` is relative, of the model's output to
    last-bit differences.
    """

    records: int
    buckets: int
    sites: int
    all_sites: int
    bytes: int
    largest_sensitivity: float
    measured_records: int


class Refit(TypedDict):
    """The workspace whose engine was refitted, the seconds that this one took, and how many weights
    differ.
    """

    workspace: str
    seconds: float
    weights: int


class BuiltEngine(TypedDict):
    """The engine: bytes by file; ``quantize`` and ``refit`` are TensorRT's alone."""

    backend: str
    hardware: dict[str, Any]
    quantize: NotRequired[str]
    refit: NotRequired[Refit]
    seconds: float
    files: dict[str, int]


class ExportedParts(TypedDict):
    """The bytes of each part, by name, and why others were left out."""

    parts: dict[str, int]
    left_out: dict[str, str]
    weights: str


class BuiltParts(TypedDict):
    """The engines of the parts: bytes by part."""

    backend: str
    hardware: dict[str, Any]
    dtype: str
    seconds: float
    parts: dict[str, int]


class Verification(TypedDict):
    """:class:`quest_deploy.verification.checks.results.Verification` as JSON."""

    passed: bool
    backend: str
    coverage: dict[str, Any]
    wrong_buckets: list[float]
    sites: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    segments: list[dict[str, Any]]
    buckets: list[dict[str, Any]]
    layer_tolerance: float
    end_to_end_tolerance: float
    end_to_end_informative: bool
    problems: list[str]


class Benchmark(TypedDict):
    """:class:`quest_deploy.evaluation.benchmark.Benchmark` as JSON."""

    backend: str
    timings: list[dict[str, Any]]
    footprints: list[dict[str, Any]]
    speedup_over_fp32: dict[str, float]
    bucket_selection_cost: dict[str, float]
    size_ratio_to_fp32: float
    precision: dict[str, Any]
    plugin_speedup: NotRequired[dict[str, float]]  # records of earlier versions have none
    buckets: int
    pipeline: NotRequired[dict[str, Any]]  # with --pipeline


class Generation(TypedDict):
    """The pictures' paths, the first of them, and how many images they show."""

    backend: str
    images: int
    picture: str
    pictures: NotRequired[list[str]]  # records of earlier versions have none


class Evaluation(TypedDict):
    """The quality of each contestant by its name, FP32 first, how the images were sampled, and the
    picture that shows some of them side by side; their files in the workspace, by contestant, and
    what they were asked for by.
    """

    backend: str
    sampling: dict[str, Any]
    results: dict[str, dict[str, Any]]
    picture: str
    captions: NotRequired[list[str]]  # records of earlier versions have neither
    images: NotRequired[dict[str, list[str]]]


class Report(TypedDict):
    """The page's path and size, and by its section the commands that make what it lacks."""

    page: str
    bytes: int
    missing: dict[str, list[str]]


class Schedule(TypedDict):
    """The table of a scheduler's steps; ``noise``: whether they add fresh noise."""

    schedule: str
    scheduler: str
    steps: int
    noise: bool


class DrawnImage(TypedDict):
    """The image that a server drew, and the seed that draws it again."""

    url: str
    picture: str
    seed: int
    seconds: float
