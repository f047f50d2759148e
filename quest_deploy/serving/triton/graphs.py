"""A package's text encoder, decoder and encoder of images, from the graphs of the parts: what
diffusers computes around them goes into them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from exporters.editor import Editor, replace_value
from exporters.part_info import HIDDEN_STATE, LAST_STATE, POOLED, part_info

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

PLACEHOLDER_DOMAIN = "quest.parts"
"""Of nodes that stand for a part, whose name is their operator's."""
LOG_VARIANCES = -30.0, 20.0
"""What diffusers clips the logarithms of latents' variances to."""


def text_encoder(graphs: Sequence[ir.Model]) -> ir.Model:
    """The text encoders' graphs, one or two, as one, in place, from ``input_ids`` (and
    ``input_ids_2``) to the UNet's conditions.

    As diffusers' ``encode_prompt`` without ``clip_skip``: of one encoder the last layer's states;
    of Stable Diffusion XL's two the last but one's, side by side, and the second one's pooled
    state.
    """
    first = graphs[0]
    if len(graphs) == 1:
        return _ending(first, {"encoder_hidden_states": _output(first, LAST_STATE)})
    names = [_last_but_one(graph) for graph in graphs]
    states = [_output(graph, name) for graph, name in zip(graphs, names, strict=True)]
    pooled = _output(graphs[1], POOLED)
    _append(first, graphs[1])
    editor, axis = Editor(first.graph), len(states[0].shape or ()) - 1
    sizes = [list(state.shape or ()) for state in states]
    wide = [*sizes[0][:-1], sum(size[-1] for size in sizes)]
    both = editor.op("Concat", states, "encoder_hidden_states", shape=wide, axis=axis)
    first.graph.extend(editor.take())
    return _ending(first, {"encoder_hidden_states": both, "text_embeds": pooled})


def with_parts(graph: ir.Model, parts: Mapping[str, ir.Model]) -> ir.Model:
    """``graph``, in place, with the graphs of ``parts`` in the places of their placeholders, see
    :class:`quest_deploy.serving.triton.parts.EncoderPlaceholder`.
    """
    for name, part in parts.items():
        places = [x for x in graph.graph if (x.domain, x.op_type) == (PLACEHOLDER_DOMAIN, name)]
        nodes, inputs, outputs = _taken(part, graph.graph, name)
        for value, given in zip(inputs, places[0].inputs, strict=True):
            assert given is not None
            value.replace_all_uses_with(given)
        graph.graph.insert_before(places[0], nodes)
        for place in places:
            replace_value(place.outputs[0], outputs[place.attributes["output"].as_string()])
        graph.graph.remove(places, safe=True)
    RemoveUnusedNodesPass()(graph)
    RemoveUnusedOpsetsPass()(graph)
    return graph


def decoder(graph: ir.Model) -> ir.Model:
    """The decoder's graph, in place, from the sampler's latents: their scaling is undone first, as
    diffusers' pipelines do, with a mean and a deviation where the decoder's configuration has them.
    """
    config, (sample,) = part_info(graph).config, graph.graph.inputs
    mean, deviation = (config.get(name) for name in ("latents_mean", "latents_std"))
    shift: Any = config.get("shift_factor") or 0.0
    factor: Any = 1.0
    if mean is not None and deviation is not None:
        shift, factor = (_per_channel(x) for x in (mean, deviation))
    editor, readers = Editor(graph.graph), list(sample.uses())
    steps = [
        ("Mul", "factor", factor),
        ("Div", "scaling", config["scaling_factor"]),
        ("Add", "shift", shift),
    ]
    value = sample
    for operator, name, constant in steps:
        array = editor.constant(f"latents.{name}", np.asarray(constant, np.float32))
        value = editor.op(operator, [value, array], f"latents.{name}ed", shape=sample.shape)
    for node, index in readers:
        node.replace_input_with(index, value)
    editor.insert_before(graph.graph[0])
    return graph


def encoder(graph: ir.Model, scale: float) -> ir.Model:
    """The encoder's graph, in place, to the ``mean`` and the ``deviation`` of the latents times
    ``scale``, which the UNet takes.
    """
    (moments,) = graph.graph.outputs
    editor = Editor(graph.graph)
    halves = [ir.Value(name=name, type=moments.type) for name in ("means", "log_variances")]
    split = ir.node("Split", [moments], {"axis": 1, "num_outputs": 2}, outputs=halves)
    low, high, half, by = (
        editor.constant(name, np.asarray(value, np.float32))
        for name, value in zip(
            ("least", "most", "half", "scale"), (*LOG_VARIANCES, 0.5, scale), strict=True
        )
    )
    clipped = editor.op("Clip", [halves[1], low, high], "clipped")
    deviation = editor.op("Exp", [editor.op("Mul", [clipped, half], "halved")], "deviations")
    outputs = {
        "mean": editor.op("Mul", [halves[0], by], "mean"),
        "deviation": editor.op("Mul", [deviation, by], "deviation"),
    }
    graph.graph.append(split)
    graph.graph.extend(editor.take())
    channels, *sides = list(moments.shape or ())[1:]
    for value in outputs.values():
        value.shape = ir.Shape(["batch", channels // 2, *sides])
    return _ending(graph, outputs)


def _per_channel(values: Sequence[float]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


def _output(graph: ir.Model, name: str) -> ir.Value:
    return next(value for value in graph.graph.outputs if value.name == name)


def _last_but_one(graph: ir.Model) -> str:
    layers = int(part_info(graph).config["num_hidden_layers"])
    return HIDDEN_STATE.format(layers - 1)


def _append(first: ir.Model, second: ir.Model) -> None:
    """Move all of ``second`` into ``first``, under names of its own."""
    nodes, inputs, _ = _taken(second, first.graph, "second")
    for value in inputs:
        value.name = f"{value.name}_2"
    first.graph.inputs.extend(inputs)
    first.graph.extend(nodes)


def _taken(
    part: ir.Model, into: ir.Graph, prefix: str
) -> tuple[list[ir.Node], list[ir.Value], dict[str, ir.Value]]:
    """Take ``part`` apart, under names that begin with ``prefix``, its weights moved to ``into``:
    its nodes, its inputs, and its outputs by their own names.
    """
    graph = part.graph
    nodes, inputs = list(graph), list(graph.inputs)
    outputs = {value.name or "": value for value in graph.outputs}
    initializers = list(graph.initializers.values())
    graph.outputs.clear()
    graph.inputs.clear()
    graph.initializers.clear()
    graph.remove(nodes)
    for value in (*initializers, *(value for node in nodes for value in node.outputs)):
        value.name = f"{prefix}/{value.name}"
    for node in nodes:
        node.name = f"{prefix}/{node.name}"
    for value in initializers:
        into.register_initializer(value)
    return nodes, inputs, outputs


def _ending(graph: ir.Model, outputs: dict[str, ir.Value]) -> ir.Model:
    """The graph with these outputs alone."""
    graph.graph.outputs.clear()
    for name, value in outputs.items():
        value.name = name
        graph.graph.outputs.append(value)
    RemoveUnusedNodesPass()(graph)
    return graph
