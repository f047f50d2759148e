"""What `inspect` finds, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.cli.console import in_float, table
from quest_deploy.cli.descriptions import described_hardware, named_loras
from quest_deploy.files import size

if TYPE_CHECKING:
    from collections.abc import Iterable


def describe_contents(content: dict[str, Any]) -> list[str]:
    """The lines that tell what a file or folder holds."""
    return list(_DESCRIPTIONS[content["kind"]](content))


def _scheme(content: dict[str, Any]) -> str:
    scheme = Scheme.from_json(content["scheme"])
    attention, softmax = (
        f"{bits} bits" if bits else "float" for bits in (scheme.attention_bits, scheme.softmax_bits)
    )
    eight = f"{', '.join(scheme.eight_bit_layers)} 8 bits, " if scheme.eight_bit_layers else ""
    left = f"{', '.join(scheme.float_layers)} float, " if scheme.float_layers else ""
    # Where layers stay in float, the first and the last may be among them.
    ends = "" if left else f"first and last layer {scheme.first_last_bits} bits, "
    branches = (
        f"; branches of rank {scheme.low_rank} beside {', '.join(scheme.low_rank_layers)}"
        if scheme.low_rank
        else ""
    )
    return (
        f"scheme {scheme.name}, {ends}{eight}{left}"
        f"{scheme.granularity.value}, "
        f"{scheme.buckets} timestep buckets; q, k and v {attention}, softmax {softmax}; "
        f"shortcuts {'split' if scheme.split_shortcuts else 'whole'}{branches}"
    )


def _checkpoint(content: dict[str, Any]) -> Iterable[str]:
    layers, products = content["layers"], content["products"]
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
    yield (
        f"checkpoint of {content['model']}, {size(content['bytes'])}, made by "
        f"{content['provenance']['method']}"
    )
    if "loras" in content["provenance"]:
        yield f"with {named_loras(content['provenance'])} folded in"
    yield _scheme(content)
    yield table(["layer", "kind", "weight", "bits", "computes in", "multiply-adds"], rows)
    if products:
        bits = sorted({product["bits"] for product in products})
        named = ", ".join(f"{x} bits" if x < 32 else "float" for x in bits)
        yield f"{len(products)} products of attention, their wider operand at {named}"
    if content["branches"]:
        ranks = [[x["layer"], str(x["rank"]), str(x["weights"])] for x in content["branches"]]
        yield table(["branch of low rank beside", "rank", "weights in FP16"], ranks)
    yield from in_float(content["float_sites"], content["sites"])
    yield (
        f"{len(layers)} layers read {content['sites']} quantized tensors; at 4 bits: "
        f"{content['weights_at_4_bits']:.1%} of the weights, "
        f"{content['macs_at_4_bits']:.1%} of the multiply-adds"
    )


def _graph(content: dict[str, Any]) -> Iterable[str]:
    by_bits = ", ".join(
        f"{count} with {bits}-bit weights"
        for bits, count in content["layers_by_weight_bits"].items()
    )
    stored = ", ".join(
        f"{name} {size(count)}" for name, count in content["initializer_bytes"].items()
    )
    yield (
        f"graph {content['name']}, {size(content['bytes'])}, from checkpoint "
        f"{content['checkpoint_sha256'][:12]}"
    )
    yield _scheme(content)
    for kind in ("inputs", "outputs"):
        for name, port in content[kind].items():
            yield f"{kind[:-1]} {name}: {port}"
    yield f"layers: {by_bits}; {content['sites']} sites"
    yield f"stored: {stored}"
    operators = ", ".join(f"{count} {name}" for name, count in content["operators"].items())
    yield f"operators: {operators}"


def _engine(content: dict[str, Any]) -> Iterable[str]:
    built_by = ", ".join(f"{name} {version}" for name, version in content["built_by"].items())
    files = ", ".join(f"{name} {size(count)}" for name, count in content["file_bytes"].items())
    yield f"engine for {content['backend']} on {described_hardware(content['hardware'])}"
    yield f"from graph {content['graph_sha256'][:12]}, built by {built_by}"
    yield f"files: {files}"
    for name in content["changed"]:
        yield f"warning: {name} is missing or was changed since it was built"
    first, *rest = _graph(content["lowered"])
    yield f"lowered {first}"
    yield from rest


def _workspace(content: dict[str, Any]) -> Iterable[str]:
    rows = [
        [name, str(stage["made"]), size(stage["bytes"]), stage["state"]]
        for name, stage in content["stages"].items()
    ]
    yield f"workspace of {content['model']}"
    if content["loras"]:
        yield named_loras(content)
    if "ip_adapter" in content:
        yield "IP-Adapter {path}, calibrated at {scale:g}".format(**content["ip_adapter"])
    yield _scheme(content)
    if rows:
        yield table(["stage", "made", "files", "state"], rows)
    else:
        yield "no stage has ended"
    for name, stage in content["stages"].items():
        if stage["reason"] is not None:
            yield f"{name}: {stage['reason']}"
    for name in content["interrupted"]:
        yield f"{name}: interrupted; the same command goes on or starts it again"


_DESCRIPTIONS = {
    "checkpoint": _checkpoint,
    "graph": _graph,
    "engine": _engine,
    "workspace": _workspace,
}
