"""What passes need and guarantee, as checks: ``requires`` and ``ensures``, which onnx_ir calls
before and after a pass, are made of these. Each looks at every node once.
"""

from __future__ import annotations

import json

import onnx_ir as ir

from exporters.graph_info import BUCKET, QUANTIZERS_KEY
from exporters.ops import timestep_quantize

PLUGIN_NAMESPACE = "plugin_namespace"


def need(holds: bool, otherwise: str) -> None:
    """Raise PreconditionError, which says ``otherwise``, unless it ``holds``."""
    if not holds:
        raise ir.passes.PreconditionError(otherwise)


def guarantee(holds: bool, otherwise: str) -> None:
    """Raise PostconditionError, which says ``otherwise``, unless it ``holds``."""
    if not holds:
        raise ir.passes.PostconditionError(otherwise)


def quantizer_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes ``quest::TimestepQuantize``."""
    ours = (timestep_quantize.DOMAIN, timestep_quantize.OP_TYPE)
    return [node for node in model.graph if (node.domain, node.op_type) == ours]


def is_kept(node: ir.Node) -> bool:
    """Whether this is a quantizer that the plugin computes."""
    ours = (node.domain, node.op_type) == (timestep_quantize.DOMAIN, timestep_quantize.OP_TYPE)
    return ours and PLUGIN_NAMESPACE in node.attributes


def dequantizers(model: ir.Model) -> list[ir.Node]:
    """The nodes DequantizeLinear."""
    return [node for node in model.graph if node.op_type == "DequantizeLinear"]


def need_tables(nodes: list[ir.Node]) -> None:
    """Raise PreconditionError where a table of a quantizer is not a constant."""
    for node in nodes:
        for name, value in zip(timestep_quantize.INPUTS, node.inputs, strict=True):
            constant = name in ("x", "bucket") or (value is not None and value.is_initializer())
            need(constant, f"{node.name}: its {name} must be a constant")


def need_expanded(model: ir.Model) -> None:
    """Raise PreconditionError where a quantizer is neither expanded nor kept for the plugin."""
    left = [str(node.name) for node in quantizer_nodes(model) if not is_kept(node)]
    need(not left, f"expand the quantizers first: {', '.join(left[:3])}")


def need_bucket(model: ir.Model) -> None:
    """The bucket is computed in the graph, and there is no quantizer that would choose by it."""
    computed = any(value.name == BUCKET for node in model.graph for value in node.outputs)
    need(computed, f"the graph computes no {BUCKET}")
    need_expanded(model)


def guarantee_codes(model: ir.Model) -> None:
    """The codes of every quantizer that the metadata names are in the graph, under their name."""
    names = {value.name for node in model.graph for value in node.outputs}
    quantizers = json.loads(model.metadata_props.get(QUANTIZERS_KEY, "[]"))
    lost = [quantizer["name"] for quantizer in quantizers if quantizer["codes"] not in names]
    guarantee(not lost, f"the codes of {', '.join(lost[:3])} are gone")
