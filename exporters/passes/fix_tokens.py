"""Take the number of tokens alone that the model is meant for, as engines do that are built for
sizes.

    encoder_hidden_states [batch, tokens, 768]  ->  encoder_hidden_states [batch, 77, 768]

Needs: any graph.
Guarantees: no size of an input is TOKENS; no node is another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.graph_info import TOKENS, TOKENS_KEY, usual_tokens
from exporters.passes.contract import guarantee

if TYPE_CHECKING:
    from collections.abc import Iterator


class FixTokens(ir.passes.InPlacePass):
    def ensures(self, model: ir.Model) -> None:
        left = [str(value.name) for value in model.graph.inputs if _is_open(value)]
        guarantee(not left, f"{', '.join(left)} still take any number of tokens")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = usual_tokens(model)
        if count is None:
            return ir.passes.PassResult(model, modified=False)
        for value in filter(_is_open, _values(model)):
            value.shape = ir.Shape([count if x == TOKENS else x for x in value.shape or ()])
        del model.metadata_props[TOKENS_KEY]
        return ir.passes.PassResult(model, modified=True)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _is_open(value: ir.Value) -> bool:
    return any(size == TOKENS for size in value.shape or ())
