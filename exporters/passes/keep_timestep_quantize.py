"""Keep each ``quest::TimestepQuantize`` as a node that TensorRT's parser hands to our plugin.

Needs: the portable graph.
Guarantees: the nodes, their inputs and their codes are as they were; no function of the ``quest`` domain.

1. A node gets the attributes ``plugin_namespace`` and ``plugin_version``: the parser looks the plugin's creator up by them and by the
   operator's name, and older parsers read the namespace nowhere else.
2. The op's function goes: a parser may import a local function instead of asking for a plugin, and cannot import one twice.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters import timestep_quantize

PLUGIN_NAMESPACE = "plugin_namespace"
PLUGIN_VERSION = "plugin_version"


class KeepTimestepQuantize(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [n for n in model.graph if (n.domain, n.op_type) == (timestep_quantize.DOMAIN, timestep_quantize.OP_TYPE)]
        for node in nodes:
            node.attributes.add(ir.AttrString(PLUGIN_NAMESPACE, timestep_quantize.DOMAIN))
            node.attributes.add(ir.AttrString(PLUGIN_VERSION, str(timestep_quantize.VERSION)))
        ours = [key for key in model.functions if key[0] == timestep_quantize.DOMAIN]
        for key in ours:
            del model.functions[key]
        return ir.passes.PassResult(model, modified=bool(nodes or ours))
