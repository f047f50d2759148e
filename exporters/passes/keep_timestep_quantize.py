"""Mark each ``quest::TimestepQuantize`` that TensorRT's parser shall hand to our plugin; the others
are left to be expanded.

Needs: the portable graph, with its metadata.
Guarantees: marked nodes keep their codes; no function of the ``quest`` domain.

1. A node gets the attributes ``plugin_namespace`` and ``plugin_version``: the parser looks the
   plugin's creator up by them and by the operator's name, and older parsers read the namespace
   nowhere else.
2. An operand of a product of two activations is not marked: a plugin would have TensorRT write out
   what attention computes between its products, softmax's weights most of all, which it can keep to
   itself where all of attention is its own.
3. A smoothing scale of equal numbers becomes one number, which broadcasts: the plugin then need not
   look up an element's channel.
4. The op's function goes: a parser may import a local function instead of asking for a plugin, and
   cannot import one twice.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.editor import Editor, array_of
from exporters.graph_info import graph_info
from exporters.ops import timestep_quantize
from exporters.passes.contract import (
    PLUGIN_NAMESPACE,
    guarantee,
    guarantee_codes,
    need,
    need_tables,
    quantizer_nodes,
)

PLUGIN_VERSION = "plugin_version"


class KeepTimestepQuantize(ir.passes.InPlacePass):
    """See the module's docstring; run before ExpandTimestepQuantize, which expands what is not
    marked.
    """

    def requires(self, model: ir.Model) -> None:
        need_tables(quantizer_nodes(model))
        info, found = graph_info(model), {node.outputs[0].name for node in quantizer_nodes(model)}
        lost = [x.name for x in info.quantizers.values() if x.integer and x.codes not in found]
        need(not lost, f"{', '.join(lost[:3])} have no quantizer to keep")

    def ensures(self, model: ir.Model) -> None:
        left = [key for key in model.functions if key[0] == timestep_quantize.DOMAIN]
        guarantee(not left, "the quantizer's function is left")
        guarantee_codes(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        info = graph_info(model)
        operands = {
            info.quantizers[quantizer].codes
            for product in info.matmuls.values()
            for quantizer in product.sites
            if quantizer is not None
        }
        kept = [node for node in quantizer_nodes(model) if node.outputs[0].name not in operands]
        for node in kept:
            node.attributes.add(ir.AttrString(PLUGIN_NAMESPACE, timestep_quantize.DOMAIN))
            node.attributes.add(ir.AttrString(PLUGIN_VERSION, str(timestep_quantize.VERSION)))
            _store_equal_channels_once(Editor(model.graph), node)
        functions = [key for key in model.functions if key[0] == timestep_quantize.DOMAIN]
        for key in functions:
            del model.functions[key]
        return ir.passes.PassResult(model, modified=bool(kept or functions))


def _store_equal_channels_once(editor: Editor, node: ir.Node) -> None:
    i = timestep_quantize.INPUTS.index("channel")
    channel = node.inputs[i]
    assert channel is not None
    values = array_of(channel)
    if values.size > 1 and (values == values[0]).all():
        node.replace_input_with(i, editor.constant(f"{channel.name}_once", values[:1]))
