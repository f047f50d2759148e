"""Measure what exporting costs beside torch's plain export of the same float model, and what more
timestep buckets add.

    python -m scripts.bench.measure_export WORKSPACE [--repeats 3] [--buckets 50] [--json FILE]

WORKSPACE needs a checkpoint, calibrated or finetuned; it is copied, never changed. The plain export
is torch.onnx.export(dynamo=True) of the model in FP32, its weights random, its shapes static, batch
2. The two exports run in processes of their own, in turn.

The plain export's seconds are those of the call that exports and saves, without imports and without
making the model; ours are those of the whole command `quest-deploy export`. So the ratio is the
least kind to us; the ratio of the whole processes is given too.

Then the checkpoint is given equal buckets, each with the scales of the old bucket that its middle
lies in, and exported again; not with --buckets 0.

The payload is what the checkpoint holds, at the bits asked for: the layers' codes, and the float
weights in 16 bits. Where they were published in FP32 no graph without rounding is as small: what
the checkpoint holds exactly is given too, with its biases, scales and tables.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from exporters.graph_info import save_graph
from exporters.passes.narrow_weights import narrow_type
from quest_deploy.artifacts.checkpoint import (
    ActivationQuantizerData,
    Architecture,
    load_checkpoint,
    save_checkpoint,
)
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import (
    ENGINES,
    GRAPH,
    IMAGES,
    REFERENCE,
    REPORTS,
    TRAJECTORIES,
    Workspace,
)
from quest_deploy.files import sha256_of
from scripts.bench.cost import cost_of

if TYPE_CHECKING:
    from quest_deploy.artifacts.checkpoint import Checkpoint

NOT_COPIED = (f"{GRAPH}*", ENGINES, IMAGES, REFERENCE, REPORTS)
CALL = (
    "import sys; from scripts.bench import measure_export as script; "
    "getattr(script, sys.argv[1])(*sys.argv[2:])"
)
"""Runs one function of this file, with strings as arguments, in a process of its own."""


@dataclass(frozen=True)
class Cost:
    """What one process took.

    Attributes:
        seconds, cpu_seconds: of the whole process, all its threads together in the second.
        peak_gib: its largest resident memory.
        bytes: of the files it made.
        nodes: of the graph it made.
        call_seconds, call_cpu_seconds: of the call that exports and saves, where that was measured.
    """

    seconds: float
    cpu_seconds: float
    peak_gib: float
    bytes: int
    nodes: int
    call_seconds: float | None = None
    call_cpu_seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The measurements, one Cost a repeat.

    Attributes:
        payload_bytes, exact_bytes: of the checkpoint, see the module's docstring.
        wider: the export with ``wider_buckets`` buckets, the checkpoint having ``buckets``; None
            where it was left out.
    """

    plain: list[Cost]
    ours: list[Cost]
    payload_bytes: int
    exact_bytes: int
    buckets: int
    wider: Cost | None = None
    wider_buckets: int = 0

    def summary(self) -> dict[str, Any]:
        """Ratios of medians, ours over the plain export's."""
        plain_call, plain_call_cpu = (
            _median(self.plain, name) for name in ("call_seconds", "call_cpu_seconds")
        )
        ours, ours_cpu = (_median(self.ours, name) for name in ("seconds", "cpu_seconds"))
        wider = (
            {
                "wider_bytes_ratio": self.wider.bytes / self.ours[0].bytes,
                "wider_more_nodes": self.wider.nodes - self.ours[0].nodes,
            }
            if self.wider
            else {}
        )
        return {
            "seconds_ratio": ours / plain_call,
            "cpu_seconds_ratio": ours_cpu / plain_call_cpu,
            "process_seconds_ratio": ours / _median(self.plain, "seconds"),
            "process_cpu_seconds_ratio": ours_cpu / _median(self.plain, "cpu_seconds"),
            "peak_ratio": _median(self.ours, "peak_gib") / _median(self.plain, "peak_gib"),
            "bytes_ratio": self.ours[0].bytes / self.plain[0].bytes,
            "payload_ratio": self.ours[0].bytes / self.payload_bytes,
            "exact_ratio": self.ours[0].bytes / self.exact_bytes,
        } | wider


def compare(root: Path, repeats: int, buckets: int) -> Comparison:
    """Measure the workspace ``root``, printing what each process took, the wider checkpoint with
    ``buckets`` or not at all; raise CalledProcessError where one fails.
    """
    from quest_deploy.calibration.trajectories import Trajectories

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied = folder / "workspace"
        shutil.copytree(root, copied, ignore=shutil.ignore_patterns(*NOT_COPIED))
        workspace = Workspace.open(copied)
        checkpoint = load_checkpoint(workspace.checkpoint_path)
        example = next(Trajectories.load(workspace.path(TRAJECTORIES)).batches(2))
        model = {
            "architecture": {
                "class_name": checkpoint.architecture.class_name,
                "config": checkpoint.architecture.config,
                "split_shortcuts": {},
                "attention": None,
            },
            "shapes": {name: list(value.shape) for name, value in example.items()},
        }
        (folder / "model.json").write_text(json.dumps(model))
        plain, ours = [], []
        for i in range(repeats):
            target = _fresh(folder / "plain")
            call = _call("export_plain", folder / "model.json", target)
            plain.append(measured(f"plain {i}", target, *call))
            export = ("-m", "quest_deploy", "export", "-w", str(copied))
            ours.append(measured(f"ours {i}", copied, *export))
        sizes = payload_bytes(checkpoint), exact_bytes(checkpoint)
        found = Comparison(plain, ours, *sizes, checkpoint.scheme.buckets)
        if not buckets:
            return found
        save_checkpoint(with_buckets(checkpoint, buckets), folder / "wider.safetensors")
        target = _fresh(folder / "wider")
        call = _call("export_portable", folder / "wider.safetensors", copied / TRAJECTORIES, target)
        wider = measured(f"{buckets} buckets", target, *call)
        return replace(found, wider=wider, wider_buckets=buckets)


def payload_bytes(checkpoint: Checkpoint) -> int:
    """What the checkpoint's weights take, see the module's docstring."""
    return _code_bytes(checkpoint) + 2 * sum(value.size for value in checkpoint.floats.values())


def exact_bytes(checkpoint: Checkpoint) -> int:
    """What all of the checkpoint takes where nothing is rounded: codes at their bits, a float
    weight in the narrowest type that holds it.
    """
    tables = sum(
        array.nbytes
        for x in (*checkpoint.layers.values(), *checkpoint.quantizers.values())
        for name, array in vars(x).items()
        if type(array) is np.ndarray and name != "codes"
    )
    floats = sum(
        value.size * (2 if narrow_type(np.asarray(value)) else 4)
        for value in checkpoint.floats.values()
    )
    return _code_bytes(checkpoint) + floats + tables


def _code_bytes(checkpoint: Checkpoint) -> int:
    return sum(x.codes.size * x.weight_bits for x in checkpoint.layers.values()) // 8


def measured(name: str, folder: Path, *arguments: str) -> Cost:
    """Run Python with ``arguments``, which write GRAPH and its data into ``folder``, and may print
    "call_seconds" and "call_cpu_seconds"; print what it took.
    """
    import onnx

    cost = cost_of(*arguments)
    found = Cost(
        bytes=sum(path.stat().st_size for path in folder.glob(f"{GRAPH}*")),
        nodes=len(onnx.load(folder / GRAPH, load_external_data=False).graph.node),
        **cost,
    )
    call = (
        ""
        if found.call_seconds is None
        else f" (the call alone {found.call_seconds:.1f} s, {found.call_cpu_seconds:.1f} CPU s)"
    )
    print(
        f"{name:<12} {found.seconds:6.1f} s {found.cpu_seconds:6.1f} CPU s{call}, peak "
        f"{found.peak_gib:.2f} GiB, {found.bytes / 1e6:.1f} MB, {found.nodes} nodes",
        flush=True,
    )
    return found


def with_buckets(checkpoint: Checkpoint, buckets: int) -> Checkpoint:
    """The checkpoint with ``buckets`` equal ones, each with the tables of the old bucket that its
    middle lies in.
    """

    old = checkpoint.scheme
    edges = Scheme.parse("w8a8", buckets=buckets, train_timesteps=old.train_timesteps).bucket_edges
    scheme = replace(old, bucket_edges=edges)
    rows = [old.bucket_of(sum(scheme.bucket_range(i)) / 2) for i in range(buckets)]
    quantizers = {}
    for name, quantizer in checkpoint.quantizers.items():
        tables = (
            ("scale", "low", "high")
            if isinstance(quantizer, ActivationQuantizerData)
            else ("scale", "zero_point")
        )
        quantizers[name] = replace(
            quantizer, **{table: getattr(quantizer, table)[rows] for table in tables}
        )
    return replace(checkpoint, scheme=scheme, quantizers=quantizers)


def export_plain(model: str, target: str) -> None:
    """Export the float model that the file ``model`` describes into the folder ``target``, as torch
    does by default.
    """
    import torch

    from quest_deploy.quantization.model import build_float_model

    content = json.loads(Path(model).read_text())
    unet = build_float_model(Architecture(**content["architecture"])).requires_grad_(
        requires_grad=False
    )
    inputs = {name: torch.zeros(shape) for name, shape in content["shapes"].items()}
    wall, cpu = time.perf_counter(), time.process_time()
    program = torch.onnx.export(
        unet, kwargs=inputs | {"return_dict": False}, dynamo=True, verbose=False
    )
    assert program is not None
    program.save(Path(target) / GRAPH, external_data=True)
    print(
        json.dumps(
            {
                "call_seconds": time.perf_counter() - wall,
                "call_cpu_seconds": time.process_time() - cpu,
            }
        )
    )


def export_portable(checkpoint: str, trajectories: str, target: str) -> None:
    """Export a checkpoint that is in no workspace into the folder ``target``."""
    from exporters.torch_to_qdq import portable_graph
    from quest_deploy.calibration.trajectories import Trajectories

    example = next(Trajectories.load(Path(trajectories)).batches(2))
    save_graph(
        portable_graph(load_checkpoint(Path(checkpoint)), example, sha256_of(Path(checkpoint))),
        Path(target) / GRAPH,
    )


def _call(function: str, *arguments: Path) -> list[str]:
    return ["-c", CALL, function, *map(str, arguments)]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _median(costs: list[Cost], name: str) -> float:
    return float(median(getattr(cost, name) for cost in costs))


def main(
    workspace: Annotated[Path, typer.Argument(help="A workspace with a checkpoint; it is copied.")],
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each export.")] = 1,
    buckets: Annotated[int, typer.Option(min=0, help="Buckets of the wider checkpoint.")] = 50,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the measurements to this file.")
    ] = None,
) -> None:
    """Measure an export beside torch's plain one."""
    comparison = compare(workspace, repeats, buckets)
    summary = comparison.summary()
    print("\n".join(f"{name}: {value:.4g}" for name, value in summary.items()))
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(comparison) | {"summary": summary}, indent=1))


if __name__ == "__main__":
    typer.run(main)
