"""What a workspace, a checkpoint, a graph or an engine holds."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from exporters.graph_info import graph_info, load_graph
from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, load_checkpoint
from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.backends.base import ENGINE_FILE, LOWERED, changed_files, engine_info
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.evaluation.precision import PrecisionReport, engine_precision, graph_precision
from quest_deploy.progress import no_progress, progress_of

if TYPE_CHECKING:
    from pathlib import Path

    from quest_deploy.progress import Display, Progress

Inspection = tuple[dict[str, Any], PrecisionReport | None]
"""What something holds, as a JSON value, its "kind" first; and what the layers of a graph or of an
engine run in.
"""


def inspect(path: Path, progress: Progress | Display = no_progress) -> Inspection:
    """Return what the file or folder holds; raise InputError where it is of no known kind."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _checkpoint(path), None
    if path.suffix == ".onnx":
        precision = graph_precision(path)
        return {**_graph(path), "precision": precision.to_json()}, precision
    if os.path.lexists(path / ENGINE_FILE):  # a link to nowhere is named where it is read
        return _engine(path, progress)
    if os.path.lexists(path / MANIFEST):
        return _workspace(path), None
    raise InputError(
        f"{path}: expected a workspace, a checkpoint (.safetensors), a graph (.onnx) or an "
        "engine's folder"
    )


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    layers: list[dict[str, Any]] = []
    for quantizer in checkpoint.quantizers.values():
        for name in (reader for reader in quantizer.layers if reader in checkpoint.layers):
            layer = checkpoint.layers[name]
            layers.append(
                {
                    "layer": name,
                    "kind": "linear" if layer.conv is None else "conv",
                    "shape": list(layer.codes.shape),
                    "weight_bits": layer.weight_bits,
                    "activation_bits": quantizer.bits,
                    "site": quantizer.name,
                    "macs": layer.macs,
                    "computes": "integer"
                    if isinstance(quantizer, ActivationQuantizerData)
                    else "float",
                }
            )
    products = [
        {
            "product": x.name,
            "sites": list(x.sites),
            "bits": checkpoint.product_bits(x),
            "macs": x.macs,
        }
        for x in checkpoint.matmuls.values()
    ]
    weights, macs = checkpoint.share_at(4)
    return {
        "kind": "checkpoint",
        "model": checkpoint.model,
        "scheme": checkpoint.scheme.to_json(),
        "layers": layers,
        "products": products,
        "branches": [
            {"layer": name, "rank": len(down), "weights": down.size + up.size}
            for name, (down, up) in checkpoint.branches.items()
        ],
        "float_sites": checkpoint.float_sites,
        "sites": len(checkpoint.quantizers),
        "provenance": checkpoint.provenance,
        "bytes": path.stat().st_size,
        "weights_at_4_bits": weights,
        "macs_at_4_bits": macs,
    }


def _graph(path: Path) -> dict[str, Any]:
    model = load_graph(path)
    info = graph_info(model)
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph
    )
    stored: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            stored[value.const_value.dtype.name] += value.const_value.nbytes
    data = path.with_name(f"{path.name}.data")
    ports = {
        kind: {
            v.name: f"{v.dtype.name if v.dtype else '?'} {[str(d) for d in v.shape or []]}"
            for v in values
        }
        for kind, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs))
    }
    bits = Counter(layer.weight_bits for layer in info.layers.values())
    return {
        "kind": "graph",
        "name": model.graph.name,
        "scheme": info.scheme.to_json(),
        "checkpoint_sha256": info.checkpoint_sha256,
        "bytes": path.stat().st_size + (data.stat().st_size if data.exists() else 0),
        **ports,
        "layers_by_weight_bits": {str(k): v for k, v in sorted(bits.items())},
        "sites": len(info.quantizers),
        "initializer_bytes": dict(stored.most_common()),
        "operators": dict(operators.most_common()),
    }


def _engine(path: Path, shown: Progress | Display) -> Inspection:
    record = engine_info(path)
    sizes = {name: (path / name).stat().st_size for name in record.files if (path / name).exists()}
    with progress_of(shown, "asking the engine what its layers run in"):
        precision = engine_precision(get_backend(record.backend), path, record.options)
    details = {
        "file_bytes": sizes,
        "changed": changed_files(path, record),
        "lowered": _graph(path / LOWERED),
        "precision": precision.to_json(),
    }
    return {**record.to_json(), "kind": "engine", **details}, precision


def _workspace(path: Path) -> dict[str, Any]:
    workspace = Workspace.open(path)
    adapter = workspace.source.ip_adapter
    stages = {
        name: {
            "state": "up to date" if reason is None else "outdated",
            "reason": reason,
            "made": workspace.stages[name].made.get("time"),
            "bytes": sum(f["bytes"] for f in workspace.stages[name].files.values()),
        }
        for name, reason in workspace.states().items()
    }
    return {
        "kind": "workspace",
        "model": workspace.model,
        "loras": workspace.source.to_json()["loras"],
        **({} if adapter is None else {"ip_adapter": asdict(adapter)}),
        "scheme": workspace.scheme.to_json(),
        "stages": stages,
        "interrupted": workspace.interrupted_stages,
    }
