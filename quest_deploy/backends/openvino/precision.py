"""What OpenVINO's runtime model tells about the precision that each multiplication runs in.

Seen with openvino 2026.4 on graphs whose precision is known: ``runtimePrecision`` is that of one of
a kernel's inputs and not what it computes in (a FullyConnected of float activations and INT8
weights, which it widens, is called i8, its kernel brgemm_avx512_f32); and ``originalLayersNames``
of such a FullyConnected are those of the node in front of it. So a multiplication counts as integer
where both its operands arrive as 8-bit integers, and is found by its weights first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from exporters.multiplications import Multiplication

_MULTIPLY = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_FUSED = ("Subgraph", "MHA", "ScaledDotProductAttention")
"""Attention as one node: its two products and the softmax between them."""
_MOVE = ("Reorder", "Transpose", "Reshape", "Convert")
_INTEGERS = ("i8", "u8")
_NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}


def runtime_precisions(runtime_model: Any, wanted: Sequence[Multiplication]) -> dict[str, str]:
    """Return what each multiplication runs in ("int8", "fp32", "bf16" or "fp16"), by the name of
    its node, where the runtime model tells.
    """
    operations = list(runtime_model.get_ordered_ops())
    found: dict[str, str] = {}
    by_weight = {name: x.node for x in wanted for name in x.weight_names}
    # A node that makes a graph's output is called by the output's name.
    by_name = {name: x.node for x in wanted for name in (x.output, x.node)}
    for operation in (op for op in operations if _kind(op) in _MULTIPLY):
        name = next((by_weight[n] for n in _behind(operation, 1) if n in by_weight), None)
        name = name or next((by_name[n] for n in _names(operation) if n in by_name), None)
        if name is not None:
            found[name] = _worse(
                found.get(name), _precision([_type(operation, 0), _type(operation, 1)])
            )
    fused = [op for op in operations if _kind(op) in _FUSED]
    for product in (x for x in wanted if x.node not in found):
        for operation in (op for op in fused if {product.node, product.output} & set(_names(op))):
            types = [
                kind
                for operand in product.operands
                if (kind := _arriving(operation, operand)) is not None
            ]
            if types:
                found[product.node] = _worse(found.get(product.node), _precision(types))
    return found


def _precision(types: Sequence[str]) -> str:
    """Return what operands of ``types`` are multiplied in; a softmax inside fused attention is in
    its other operand's.
    """
    floats = [kind for kind in types if kind not in _INTEGERS]
    return _NAMES.get(floats[0], floats[0]) if floats else "int8"


def _worse(known: str | None, other: str) -> str:
    """Of the parts of one multiplication, what is not integer counts."""
    return other if known in (None, "int8") else str(known)


def _arriving(operation: Any, operand: tuple[str, ...]) -> str | None:
    """The type of the input of a fused ``operation`` that brings ``operand``; None where it is
    computed inside.
    """
    sources = [
        (set(_behind(operation, i)), _type(operation, i)) for i in range(operation.get_input_size())
    ]
    return next((kind for name in operand for names, kind in sources if name in names), None)


def _behind(operation: Any, index: int) -> Iterator[str]:
    """The names of what an input comes from, through what only moves or widens it."""
    if index >= operation.get_input_size():
        return
    source = operation.input(index).get_source_output().get_node()
    yield from _names(source)
    if _kind(source) in _MOVE:
        yield from _behind(source, 0)


def _names(operation: Any) -> Iterator[str]:
    """A node's own name and those of the graph's nodes that it was made of, also without what the
    runtime appends to them.
    """
    for name in (
        operation.get_friendly_name(),
        *runtime_info(operation, "originalLayersNames").split(","),
    ):
        yield name
        yield name.rpartition("/")[0] or name


def _kind(operation: Any) -> str:
    return runtime_info(operation, "layerType")


def runtime_info(operation: Any, key: str) -> str:
    """Return what the runtime model tells of a node under ``key``, such as layerType; empty where
    it does not.
    """
    told = operation.get_rt_info()
    return str(told[key].get()) if key in told else ""


def _type(operation: Any, index: int) -> str:
    return str(operation.input(index).get_element_type().get_type_name())
