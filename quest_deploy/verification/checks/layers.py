"""Layers' and products' outputs against the reference's, from the reference's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graph_info import BUCKET
from exporters.passes.cut import cut_layer, cut_matmul
from quest_deploy.artifacts.reference import Key
from quest_deploy.quantization import affine_numpy
from quest_deploy.verification.tolerances import ChannelErrors, layer_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from exporters.graph_info import GraphInfo
    from quest_deploy.artifacts.reference import Record, Tables
    from quest_deploy.verification.checks.engine import Arrays, ByRecord, CheckedEngine

    Errors = ByRecord[NDArray[np.float32]]


def check_layers(
    engine: CheckedEngine, held: dict[str, dict[int, Record]], tables: dict[str, Tables]
) -> Iterator[Errors]:
    """The relative error of the worst output channel in each record's rows, float32 [rows], of some
    of the layers and products ``held`` at a time.
    """
    info = engine.info
    for kind, cut in ((info.layers, cut_layer), (info.matmuls, cut_matmul)):
        of_kind = {name: records for name, records in held.items() if name in kind}
        for group in engine.groups(
            of_kind,
            lambda name: {
                value: Key.operand(name, i) if quantizer is None else Key.x(quantizer)
                for i, (value, quantizer) in enumerate(_operands(info, name))
            },
            lambda name: _output(info, name),
        ):
            yield _check_group(engine, cut, group, held[group[0]], tables)


def _operands(info: GraphInfo, name: str) -> list[tuple[str, str | None]]:
    """What a layer or product reads: each value of the graph, with its quantizer."""
    if name in info.layers:
        quantizer = info.layers[name].site
        return [(info.quantizers[quantizer].input, quantizer)]
    return list(zip(info.matmuls[name].inputs, info.matmuls[name].sites, strict=True))


def _output(info: GraphInfo, name: str) -> str:
    return (info.layers.get(name) or info.matmuls[name]).output


def _check_group(
    engine: CheckedEngine,
    cut: Callable[..., ir.Model],
    group: list[str],
    records: dict[int, Record],
    tables: dict[str, Tables],
) -> Errors:
    info, types = engine.info, engine.types
    outputs = {name: _output(info, name) for name in group}

    def operand(record: Record, key: str, value: str, quantizer: str | None) -> NDArray[Any]:
        x = record.tensors[key] if quantizer is None else record.untied(quantizer)
        if quantizer is not None and types.half(value):
            known = (x, record.bucket, tables[quantizer], info.quantizers[quantizer].axis)
            x = affine_numpy.levels(*known) * affine_numpy.step(*known)
        return types.cast(value, x)

    def tensors(record: Record) -> tuple[Arrays, Arrays]:
        feed: Arrays = {BUCKET: record.bucket}
        for name in group:
            for i, (value, quantizer) in enumerate(_operands(info, name)):
                if value not in feed:  # q, k and v read the same
                    feed[value] = operand(record, Key.operand(name, i), value, quantizer)
        return feed, {outputs[name]: record.tensors[Key.y(name)] for name in group}

    channels: dict[str, list[ChannelErrors]] = {name: [] for name in group}
    graph = cut(engine.graph, info, *group)
    for _, mine, theirs in engine.run(graph, map(tensors, records.values())):
        for name, output in outputs.items():
            y = mine[output].astype(np.float32, copy=False)
            axis = 1 if y.ndim == 4 else -1
            channels[name].append(ChannelErrors.of(y, theirs[output], axis, types.half(output)))
    return {
        name: dict(zip(records, np.split(layer_error(found), len(records)), strict=True))
        for name, found in channels.items()
    }
