"""Compare speeds on OpenVINO: a portable graph's engine, the same with static scales and with more
buckets, NNCF's INT8, and FP32.

    python -m scripts.bench.compare_openvino GRAPH [--dtype fp32 --dtype bf16] [--json FILE]

GRAPH is what `quest-deploy export` wrote. FP32 is the float graph of the same model, on the
dequantized weights (RemoveQuantization); NNCF quantizes that graph with its default preset,
model_type=TRANSFORMER and random calibration samples. So both errors, ours and NNCF's, are what is
lost on top of the weights' own rounding. Inputs are random.

The engine is compiled and timed beside one rival at a time, their runs alternating in one process
with the node profile on: four compiled models of Stable Diffusion's size would not fit into common
memory. So each ratio's two sides are measured together, and the engine's own time is the median of
all its runs.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from exporters.editor import array_of
from exporters.graph_info import (
    BUCKET,
    SAMPLE_SHAPE_KEY,
    graph_info,
    load_graph,
    sample_shape,
    save_graph,
)
from exporters.passes.remove_quantization import RemoveQuantization
from quest_deploy.backends.base import input_shapes, processor_name
from quest_deploy.backends.openvino.backend import compile_graph
from quest_deploy.backends.openvino.precision import runtime_info
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Feeds = dict[str, Array]


class Variant(StrEnum):
    """A form of the model."""

    ENGINE = "engine"
    """What `quest-deploy build-engine --backend openvino` runs: each sample's bucket is chosen in
    the graph.
    """
    STATIC = "static scales"
    """The engine, frozen to one bucket."""
    WIDER = "50 buckets"
    """The engine with so many buckets."""
    NNCF = "nncf int8"
    FP32 = "fp32"


RIVALS = (Variant.FP32, Variant.NNCF, Variant.STATIC, Variant.WIDER)
FILES = {
    Variant.ENGINE: "engine.onnx",
    Variant.STATIC: "static.onnx",
    Variant.WIDER: "wider.onnx",
    Variant.FP32: "float.onnx",
    Variant.NNCF: "nncf.xml",
}
WIDER_BUCKETS = 50
TRAIN_TIMESTEPS = 1000.0
MASK = "attention_mask"
"""How the names of inputs end that are 1 for tokens and 0 for padding."""
ROLES = {
    "convolution and linear": {
        "Convolution",
        "FullyConnected",
        "FullyConnectedQuantizedLegacy",
        "Deconvolution",
    },
    "attention": {"MatMul", "Softmax", "ScaledDotProductAttention"},
    "norm": {"MVN", "NormalizeL2", "RMSNorm", "GroupNormalization"},
    "quantize and elementwise": {
        "Subgraph",
        "Eltwise",
        "FakeQuantize",
        "Add",
        "Multiply",
        "Divide",
        "Subtract",
        "Swish",
        "Gelu",
        "Power",
        "Round",
        "Clamp",
    },
    "layout": {
        "Reorder",
        "Transpose",
        "Reshape",
        "Split",
        "VariadicSplit",
        "Concatenation",
        "StridedSlice",
    },
}
"""The profile's roles by the node type that openvino reports."""


@dataclass
class Timing:
    """What the runs of one variant showed.

    Attributes:
        seconds: of each run, the warm-up left out.
        profile: milliseconds by role, of the fastest run.
        output: the model's output on the first inputs.
    """

    seconds: list[float] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)
    output: Array | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        seconds: the median run. speedup: against_engine of FP32 over that of this one.
        against_engine: of each run of this variant over the engine's run before it, the median; 1
            for the engine.
        error: relative L2 distance of the output from FP32's, on the same inputs.
        profile: milliseconds by role.
    """

    variant: str
    dtype: str
    seconds: float
    speedup: float
    against_engine: float
    error: float
    profile: dict[str, float]


def role_of(node_type: str, fused: str) -> str:
    """The role of a node of ``node_type`` that computes the layers ``fused``, openvino's
    comma-separated names.

    A Subgraph that computes a softmax is fused attention, its products and its scales included.
    """
    if node_type == "Subgraph" and "softmax" in fused.lower():
        return "attention"
    return next((role for role, types in ROLES.items() if node_type in types), "rest")


def profile_of(compiled: Any, request: Any) -> dict[str, float]:
    """Milliseconds by role of the request's last run."""
    fused: dict[str, str] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        fused[node.get_friendly_name()] = runtime_info(node, "originalLayersNames")
    total: Counter[str] = Counter()
    for entry in request.profiling_info:
        total[role_of(entry.node_type, fused.get(entry.node_name, ""))] += (
            entry.real_time.total_seconds() * 1000
        )
    return {role: round(milliseconds, 2) for role, milliseconds in total.most_common()}


def time_in_turn(
    models: Mapping[Variant, Path], options: EngineOptions, feeds: Feeds, runs: int
) -> dict[Variant, Timing]:
    """Compile ``models`` and run them in turn, ``runs`` times each after one warm-up."""
    shapes = tuple((name, value.shape) for name, value in sorted(feeds.items()))
    compiled = {
        variant: compile_graph(path, options, shapes, profile=True)
        for variant, path in models.items()
    }
    requests = {variant: model.create_infer_request() for variant, model in compiled.items()}
    timings = {variant: Timing() for variant in models}
    for run in range(runs + 1):
        for variant, request in requests.items():
            timing = timings[variant]
            start = time.perf_counter()
            request.infer(feeds)
            seconds = time.perf_counter() - start
            if run == 0:
                timing.output = request.get_output_tensor(0).data.copy()
                continue
            if seconds < min(timing.seconds, default=float("inf")):
                timing.profile = profile_of(compiled[variant], request)
            timing.seconds.append(seconds)
    return timings


def compare(
    models: Mapping[Variant, Path], feeds: Feeds, dtypes: list[str], threads: int, runs: int
) -> list[Row]:
    """Time the engine beside each rival at each dtype; errors are from FP32 at the first dtype that
    is fp32, or at the first.
    """
    reference: Array | None = None
    rows: list[Row] = []
    for dtype in sorted(dtypes, key=lambda name: name != "fp32"):
        options = EngineOptions(threads=threads, dtype=dtype)
        pairs: dict[Variant, dict[Variant, Timing]] = {}
        for rival in (variant for variant in models if variant is not Variant.ENGINE):
            pairs[rival] = time_in_turn(
                {Variant.ENGINE: models[Variant.ENGINE], rival: models[rival]}, options, feeds, runs
            )
            gc.collect()
            print(
                f"{dtype}: {rival} {median(pairs[rival][rival].seconds):.3f} s,",
                end=" ",
                flush=True,
            )
            print(f"engine {median(pairs[rival][Variant.ENGINE].seconds):.3f} s", flush=True)
        if reference is None:
            reference = pairs[Variant.FP32][Variant.FP32].output
        assert reference is not None
        rows += rows_of(dtype, pairs, reference)
    return rows


def rows_of(
    dtype: str, pairs: Mapping[Variant, Mapping[Variant, Timing]], reference: Array
) -> list[Row]:
    """The table's lines for one dtype, from the engine's and a rival's timings in each pair."""
    engine = Timing([s for pair in pairs.values() for s in pair[Variant.ENGINE].seconds])
    fastest = min(
        (pair[Variant.ENGINE] for pair in pairs.values()), key=lambda timing: min(timing.seconds)
    )
    engine.profile, engine.output = fastest.profile, fastest.output
    ratios = {
        # A machine's speed drifts by more than what is compared: so run beside run.
        rival: median(
            r / e for r, e in zip(pair[rival].seconds, pair[Variant.ENGINE].seconds, strict=True)
        )
        for rival, pair in pairs.items()
    }
    rows = [_row(Variant.ENGINE, dtype, engine, ratios[Variant.FP32], 1.0, reference)]
    for rival, ratio in ratios.items():
        rows.append(
            _row(rival, dtype, pairs[rival][rival], ratios[Variant.FP32] / ratio, ratio, reference)
        )
    return rows


def _row(
    variant: Variant,
    dtype: str,
    timing: Timing,
    speedup: float,
    against_engine: float,
    reference: Array,
) -> Row:
    assert timing.output is not None
    error = relative_l2(timing.output, reference)
    return Row(
        variant.value, dtype, median(timing.seconds), speedup, against_engine, error, timing.profile
    )


def relative_l2(output: Array, expected: Array) -> float:
    """The L2 norm of the difference over that of ``expected``."""
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(output.astype(np.float64) - wide) / np.linalg.norm(wide))


def random_feeds(graph: Path, batch: int, seed: int, side: int | None = None) -> Feeds:
    """Inputs of the portable graph: standard normal, but for the timesteps, uniform in [0, 1000),
    one for each sample, and masks, which leave nothing out; samples of height and width ``side``,
    or as the model has them.
    """
    generator, feeds = np.random.default_rng(seed), {}
    for name, shape in input_shapes(_sized(load_graph(graph), side), batch).items():
        if name == "timestep":
            wide = generator.uniform(0, TRAIN_TIMESTEPS, shape)
        elif name.endswith(MASK):
            wide = np.ones(shape)
        else:
            wide = generator.standard_normal(shape)
        feeds[name] = wide.astype(np.float32)
    return feeds


def _sized(model: ir.Model, side: int | None) -> ir.Model:
    """``model``, meant for samples of height and width ``side``."""
    if side is not None:
        shape = [*sample_shape(model)[:-2], side, side]
        model.metadata_props[SAMPLE_SHAPE_KEY] = json.dumps(shape)
    return model


def build(
    graph: Path, folder: Path, feeds: Feeds, calibration: list[Feeds], rivals: Sequence[Variant]
) -> dict[Variant, Path]:
    """Write the engine of the portable ``graph`` and its ``rivals`` into ``folder``; what is there
    already is kept.
    """

    def lowered(model: ir.Model, frozen_bucket: int | None = None) -> ir.Model:
        backend = get_backend("openvino")
        return backend.lower(model, EngineOptions(), frozen_bucket=frozen_bucket)

    def variant_of(variant: Variant, model: ir.Model) -> ir.Model:
        if variant is Variant.FP32:
            RemoveQuantization()(model)
            return model
        if variant is Variant.STATIC:
            return lowered(model, graph_info(model).scheme.buckets // 2)
        return lowered(with_buckets(model, WIDER_BUCKETS) if variant is Variant.WIDER else model)

    paths = {variant: folder / FILES[variant] for variant in (Variant.ENGINE, *rivals)}
    for variant, path in paths.items():
        if not path.exists() and variant is not Variant.NNCF:
            save_graph(variant_of(variant, load_graph(graph)), path)
    if Variant.NNCF in paths and not paths[Variant.NNCF].exists():
        quantize_with_nncf(paths[Variant.FP32], paths[Variant.NNCF], feeds, calibration)
    return paths


def with_buckets(model: ir.Model, buckets: int) -> ir.Model:
    """The portable graph with ``buckets`` equal ones, each with the tables of the old bucket at its
    middle, counted in buckets.
    """
    import onnx_ir as ir

    scheme, initializers = graph_info(model).scheme, model.graph.initializers
    rows = ((np.arange(buckets) + 0.5) * scheme.buckets / buckets).astype(int)
    edges = (np.arange(1, buckets) * scheme.train_timesteps / buckets).astype(np.float32)
    initializers["bucket_edges"].const_value, initializers["bucket_edges"].shape = (
        ir.tensor(edges),
        ir.Shape(edges.shape),
    )
    readers = [node for node, _ in ir.convenience.create_value_mapping(model.graph)[BUCKET].uses()]
    tables = {
        value
        for node in readers
        for value in node.inputs
        if value is not None and value.name in initializers
    }
    for table in tables:
        array = array_of(table)
        if array.shape[:1] == (scheme.buckets,) and not (table.name or "").endswith(".channel"):
            wider = np.ascontiguousarray(array[rows])
            table.const_value, table.shape = ir.tensor(wider), ir.Shape(wider.shape)
    return model


def quantize_with_nncf(source: Path, target: Path, feeds: Feeds, calibration: list[Feeds]) -> None:
    """NNCF's static INT8 of the float graph: default preset, model_type=TRANSFORMER, for the shapes
    of ``feeds``.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    dataset = nncf.Dataset(calibration)
    quantized = nncf.quantize(
        model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


def main(
    graph: Annotated[Path, typer.Argument(help="The portable graph, an ONNX file.")],
    batch: int = 2,
    threads: int = 2,
    dtype: Annotated[
        list[str],
        typer.Option(help="What is not INT8 runs in it: fp32 or bf16; may be given twice."),
    ] = ["fp32", "bf16"],  # noqa: B006 - typer's way
    rival: Annotated[
        list[Variant],
        typer.Option(help="What the engine is timed beside; may be repeated. FP32 always is."),
    ] = list(RIVALS),  # noqa: B006 - typer's way
    sample_size: Annotated[
        int | None, typer.Option(help="Height and width of samples, if not the model's.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each side of each pair.")] = 11,
    calibration_samples: Annotated[int, typer.Option(help="Random batches for NNCF.")] = 2,
    folder: Annotated[
        Path | None, typer.Option(help="Keep the built variants here, and use those that are here.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Build the variants, time them, and print the table."""
    import nncf
    import openvino

    feeds, *calibration = (
        random_feeds(graph, batch, seed, sample_size) for seed in range(calibration_samples + 1)
    )
    versions = {"openvino": openvino.__version__, "nncf": nncf.__version__}
    print(
        f"{processor_name()}, {threads} threads, batch {batch}, {runs} runs; {versions}", flush=True
    )
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        variants = [variant for variant in RIVALS if variant in (Variant.FP32, *rival)]
        rows = compare(
            build(graph, place, feeds, calibration, variants), feeds, dtype, threads, runs
        )
    for row in rows:
        print(
            f"{row.dtype} {row.variant:14} {row.seconds:7.3f} s  {row.speedup:5.2f} x fp32  "
            f"{row.against_engine:5.3f} x engine",
            end="  ",
        )
        print(
            f"error {row.error:.2e}; "
            + ", ".join(f"{role} {ms:.0f} ms" for role, ms in row.profile.items())
        )
    if json_file:
        machine = {
            "processor": processor_name(),
            "threads": threads,
            "batch": batch,
            "shapes": {name: value.shape for name, value in feeds.items()},
            "runs": runs,
            "versions": versions,
        }
        nncf_options = {
            "preset": "default",
            "model_type": "TRANSFORMER",
            "calibration_batches": calibration_samples,
        }
        result = {
            **machine,
            "nncf": nncf_options,
            "fp32_weights": "dequantized",
            "rows": [asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
