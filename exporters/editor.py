"""A thin convenience over onnx_ir for building nodes in front of an existing one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quest_deploy.artifacts.lazy_tensors import Array


class Editor:
    """Builds named nodes and constants, then inserts all of them before one node of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: Sequence[Any] | ir.Shape | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output called ``name``; its dtype is the first input's unless
        given.
        """
        first = inputs[0]
        output = ir.Value(
            name=name,
            type=ir.TensorType(dtype)
            if dtype is not None
            else (None if first is None else first.type),
            shape=shape if isinstance(shape, ir.Shape) or shape is None else ir.Shape(shape),
        )
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        self._nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=[output], name=name))
        return output

    def constant(self, name: str, array: NDArray[Any] | ir.TensorProtocol) -> ir.Value:
        """An initializer; a second call with the same name returns the first one's value."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = (
            ir.tensor(np.asarray(array, order="C"), name=name)
            if isinstance(array, np.ndarray)
            else array
        )
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def insert_before(self, node: ir.Node) -> None:
        """Insert everything built so far before ``node``."""
        self.graph.insert_before(node, self.take())

    def take(self) -> list[ir.Node]:
        """Hand over everything built so far, for the caller to insert."""
        nodes, self._nodes = self._nodes, []
        return nodes


def lazy(name: str, array: Array) -> ir.TensorProtocol:
    """``array`` as a tensor that is in memory no longer than it is read."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.asarray(array, order="C"), name=name),
        ir.DataType.from_numpy(array.dtype),
        ir.Shape(array.shape),
        name=name,
    )


def store_as(value: ir.Value, dtype: ir.DataType) -> None:
    """Store the initializer ``value`` in ``dtype``, converted when it is read."""
    tensor = value.const_value
    assert tensor is not None

    def converted() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=value.name)

    value.const_value = ir.LazyTensor(
        converted, dtype, ir.Shape(tensor.shape.numpy()), name=value.name
    )
    value.type = ir.TensorType(dtype)


def array_of(value: ir.Value) -> NDArray[Any]:
    """The constant behind an initializer; raise ValueError where ``value`` is not one."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is not a constant")
    return np.asarray(value.const_value.numpy())


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``; where ``old`` is a graph output, ``new`` takes its
    place and its name.
    """
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_replaced"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
