"""What the graph of a text encoder or a VAE says about itself, and the names of its inputs and
outputs; without torch, for machines that only run engines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporters.editor import array_of
from quest_deploy.artifacts.schema import parse, validated
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

PART_KEY = "quest.part"
IDS, MASK = "input_ids", "attention_mask"
"""What a text encoder's graph takes, int32 [B, T]: token ids, and of those that read a mask 1 for a
token and 0 for padding.
"""
LAST_STATE, POOLED, HIDDEN_STATE = "last_hidden_state", "pooled", "hidden_states.{}"
"""What it gives: float32 [B, T, D], and of CLIP [B, P] and after each layer [B, T, D], the
embeddings first.
"""
LATENTS, IMAGE, MOMENTS = "sample", "image", "moments"


@validated("a part's graph")
@dataclass(frozen=True)
class PartInfo:
    """What a part was made from: the name of its class and its configuration."""

    kind: str
    config: dict[str, Any]


def part_info(model: ir.Model) -> PartInfo:
    """What the graph of a part says that it was made from."""
    repair = "run `quest-deploy export-parts` again"
    try:
        found = json.loads(model.metadata_props.get(PART_KEY, "null"))
    except ValueError as e:
        raise InputError(f"the graph's {PART_KEY!r} is no JSON ({e}); {repair}") from e
    return parse(PartInfo, found, "the graph", repair)


def last_norm(model: ir.Model) -> dict[str, NDArray[Any]]:
    """The "weight" and the "bias" of a text encoder's last norm, which pipelines put the states of
    an earlier layer through; raise InputError where it does not end with one.
    """
    node = next((x.producer() for x in model.graph.outputs if x.name == LAST_STATE), None)
    parameters = [] if node is None else [x for x in node.inputs[1:] if x is not None]
    if node is None or node.op_type != "LayerNormalization" or len(parameters) != 2:
        raise InputError(
            f"{LAST_STATE}: expected a text encoder that ends with a norm of weight and bias, "
            f"found {node and node.op_type}; give it to load_pipeline in torch"
        )
    return dict(zip(("weight", "bias"), map(array_of, parameters), strict=True))
