"""A layer's output, or a product's, against the reference's, from the reference's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graph_info import BUCKET
from exporters.passes.cut import cut_layer, cut_matmul
from quest_deploy.artifacts.reference import Key
from quest_deploy.quantization import affine_numpy
from quest_deploy.verification.tolerances import ChannelErrors, layer_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quest_deploy.artifacts.reference import Record, Tables
    from quest_deploy.verification.checks.engine import Arrays, CheckedEngine


def check_layer(
    engine: CheckedEngine, layer: str, records: dict[int, Record], tables: dict[str, Tables]
) -> dict[int, NDArray[np.float32]]:
    """The relative error of the worst output channel in each record's rows, float32 [rows]."""
    graph, info, types = engine.graph, engine.info, engine.types
    quantizers: tuple[str | None, ...]
    sources: tuple[str, ...]
    if layer in info.matmuls:
        product = info.matmuls[layer]
        output, cut = product.output, cut_matmul(graph, info, layer)
        quantizers, sources = product.sites, product.inputs
    else:
        quantizer = info.layers[layer].site
        output, cut = info.layers[layer].output, cut_layer(graph, info, layer)
        quantizers, sources = (quantizer,), (info.quantizers[quantizer].input,)

    def operand(record: Record, index: int) -> NDArray[Any]:
        name = quantizers[index]
        x = record.tensors[Key.operand(layer, index)] if name is None else record.untied(name)
        if name is not None and types.half(sources[index]):
            known = (x, record.bucket, tables[name], info.quantizers[name].axis)
            x = affine_numpy.levels(*known) * affine_numpy.step(*known)
        return types.cast(sources[index], x)

    def tensors(record: Record) -> tuple[Arrays, Arrays]:
        feed = {
            **{source: operand(record, i) for i, source in enumerate(sources)},
            BUCKET: record.bucket,
        }
        return feed, {output: record.tensors[Key.y(layer)]}

    channels = []
    for _, mine, theirs in engine.run(cut, map(tensors, records.values())):
        y = mine[output].astype(np.float32, copy=False)
        channels.append(
            ChannelErrors.of(y, theirs[output], 1 if y.ndim == 4 else -1, types.half(output))
        )
    return dict(zip(records, np.split(layer_error(channels), len(records)), strict=True))
