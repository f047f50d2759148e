"""`quest-deploy inspect`: what is in a workspace, a checkpoint, a graph or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.backends.base import (
    ENGINE_FILE,
    LOWERED,
    changed_files,
    engine_info,
)
from quest_deploy.backends.registry import get_backend
from quest_deploy.cli.console import Console, in_float, size, table
from quest_deploy.cli.options import JsonOption
from quest_deploy.cli.precision import describe
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from quest_deploy.artifacts.scheme import Scheme


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A workspace, a checkpoint (.safetensors), a graph (.onnx) or an engine's folder."
        ),
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="List each layer of a graph or engine, not each kind.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a file or folder holds: bits per layer, the precision an engine runs each in,
    buckets, sizes, provenance.
    """
    console = Console(as_json=as_json)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        content, text = _checkpoint(path)
    elif path.suffix == ".onnx":
        content, text = _graph(path, layers=layers)
    elif (path / ENGINE_FILE).exists():
        content, text = _engine(console, path, layers=layers)
    elif (path / MANIFEST).exists():
        content, text = _workspace(path)
    else:
        raise InputError(
            f"{path}: expected a workspace, a checkpoint (.safetensors), a graph (.onnx) or an "
            "engine's folder"
        )
    console.result({"path": str(path), **content}, text)


def _scheme(scheme: Scheme) -> str:
    attention, softmax = (
        f"{bits} bits" if bits else "float" for bits in (scheme.attention_bits, scheme.softmax_bits)
    )
    return (
        f"scheme {scheme.name}, first and last layer {scheme.first_last_bits} bits, "
        f"{scheme.granularity.value}, "
        f"{scheme.buckets} timestep buckets; q, k and v {attention}, softmax {softmax}; "
        f"shortcuts {'split' if scheme.split_shortcuts else 'whole'}"
    )


def _checkpoint(path: Path) -> tuple[dict[str, Any], str]:
    from quest_deploy.artifacts.checkpoint import SiteData, load_checkpoint

    checkpoint = load_checkpoint(path)
    layers: list[dict[str, Any]] = []
    for site in checkpoint.sites.values():
        for name in (reader for reader in site.layers if reader in checkpoint.layers):
            layer = checkpoint.layers[name]
            layers.append(
                {
                    "layer": name,
                    "kind": "linear" if layer.conv is None else "conv",
                    "shape": list(layer.weight_codes.shape),
                    "weight_bits": layer.weight_bits,
                    "activation_bits": site.bits,
                    "site": site.name,
                    "macs": layer.macs,
                    "computes": "integer" if isinstance(site, SiteData) else "float",
                }
            )
    products = [
        {
            "product": x.name,
            "sites": list(x.sites),
            "bits": checkpoint.product_bits(x),
            "macs": x.macs,
        }
        for x in checkpoint.products.values()
    ]
    weights, macs = checkpoint.share_at(4)
    content = {
        "kind": "checkpoint",
        "model": checkpoint.model,
        "scheme": checkpoint.scheme.to_json(),
        "layers": layers,
        "products": products,
        "float_sites": checkpoint.float_sites,
        "sites": len(checkpoint.sites),
        "provenance": checkpoint.provenance,
        "bytes": path.stat().st_size,
        "weights_at_4_bits": weights,
        "macs_at_4_bits": macs,
    }
    rows = [
        [
            x["layer"],
            x["kind"],
            "x".join(map(str, x["shape"])),
            f"w{x['weight_bits']}a{x['activation_bits']}",
            x["computes"],
            str(x["macs"]),
        ]
        for x in layers
    ]
    text = "\n".join(
        [
            f"checkpoint of {checkpoint.model}, {size(path.stat().st_size)}, made by "
            f"{checkpoint.provenance['method']}",
            _scheme(checkpoint.scheme),
            table(["layer", "kind", "weight", "bits", "computes in", "multiply-adds"], rows),
            *(
                [f"{len(products)} products of attention, their wider operand at {_bits(products)}"]
                if products
                else []
            ),
            *in_float(checkpoint.float_sites, len(checkpoint.sites)),
            f"{len(layers)} layers read {len(checkpoint.sites)} quantized tensors; "
            f"at 4 bits: {weights:.1%} of the weights, {macs:.1%} of the multiply-adds",
        ]
    )
    return content, text


def _bits(products: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{bits} bits" if bits < 32 else "float"
        for bits in sorted({product["bits"] for product in products})
    )


def _graph(path: Path, *, layers: bool) -> tuple[dict[str, Any], str]:
    from quest_deploy.evaluation.precision import graph_precision

    content, text = _content(path)
    precision = graph_precision(path)
    return {
        **content,
        "precision": precision.to_json(),
    }, f"{text}\n{describe(precision, layers=layers)}"


def _content(path: Path) -> tuple[dict[str, Any], str]:
    from collections import Counter

    from exporters.graph_info import graph_info, load_graph

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
    total = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    ports = {
        kind: {
            v.name: f"{v.dtype.name if v.dtype else '?'} {[str(d) for d in v.shape or []]}"
            for v in values
        }
        for kind, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs))
    }
    bits = Counter(layer.weight_bits for layer in info.layers.values())
    content = {
        "kind": "graph",
        "scheme": info.scheme.to_json(),
        "checkpoint_sha256": info.checkpoint_sha256,
        "bytes": total,
        **ports,
        "layers_by_weight_bits": {str(k): v for k, v in sorted(bits.items())},
        "sites": len(info.sites),
        "initializer_bytes": dict(stored.most_common()),
        "operators": dict(operators.most_common()),
    }
    by_bits = ", ".join(f"{count} with {b}-bit weights" for b, count in sorted(bits.items()))
    text = "\n".join(
        [
            f"graph {model.graph.name}, {size(total)}, from checkpoint "
            f"{info.checkpoint_sha256[:12]}",
            _scheme(info.scheme),
            *(
                f"{kind[:-1]} {name}: {port}"
                for kind, values in ports.items()
                for name, port in values.items()
            ),
            f"layers: {by_bits}; {len(info.sites)} sites",
            f"stored: {', '.join(f'{name} {size(count)}' for name, count in stored.most_common())}",
            f"operators: {', '.join(f'{count} {name}' for name, count in operators.most_common())}",
        ]
    )
    return content, text


def _engine(console: Console, path: Path, *, layers: bool) -> tuple[dict[str, Any], str]:
    from quest_deploy.evaluation.precision import engine_precision

    record = engine_info(path)
    sizes = {name: (path / name).stat().st_size for name in record.files if (path / name).exists()}
    changed = changed_files(path, record)
    graph, graph_text = _content(path / LOWERED)
    with console.progress("asking the engine what its layers run in"):
        precision = engine_precision(get_backend(record.backend), path, record.options)
    built_by = ", ".join(f"{name} {version}" for name, version in record.built_by.items())
    text = "\n".join(
        [
            f"engine for {record.backend} on {record.hardware}",
            f"from graph {record.graph_sha256[:12]}, built by {built_by}",
            f"files: {', '.join(f'{name} {size(count)}' for name, count in sizes.items())}",
            *(f"warning: {name} is missing or was changed since it was built" for name in changed),
            "lowered " + graph_text,
            describe(precision, layers=layers),
        ]
    )
    details = {
        "file_bytes": sizes,
        "changed": changed,
        "lowered": graph,
        "precision": precision.to_json(),
    }
    return {**record.to_json(), "kind": "engine", **details}, text


def _workspace(path: Path) -> tuple[dict[str, Any], str]:
    workspace = Workspace.open(path)
    stages = {}
    for name, record in workspace.stages.items():
        try:
            workspace.require(name)
            state = "up to date"
        except InputError as e:
            state = str(e)
        stages[name] = {
            "state": state,
            "made": record.made.get("time"),
            "bytes": sum(f["bytes"] for f in record.files.values()),
        }
    rows = [[name, str(s["made"]), size(s["bytes"]), s["state"]] for name, s in stages.items()]
    content = {
        "kind": "workspace",
        "model": workspace.model,
        "scheme": workspace.scheme.to_json(),
        "stages": stages,
    }
    text = "\n".join(
        [
            f"workspace of {workspace.model}",
            _scheme(workspace.scheme),
            table(["stage", "made", "files", "state"], rows),
        ]
    )
    return content, text
