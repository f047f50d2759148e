"""What of a model runs beside its UNet, as graphs: exported by `quest-deploy export-parts`, or made
where that has not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporters.graph_info import load_graph
from exporters.parts import (
    DECODER_CLASSES,
    ENCODER_CLASSES,
    TEXT_CLASSES,
    decoder_graph,
    encoder_graph,
    text_encoder_graph,
)
from quest_deploy.artifacts.workspace import PARTS
from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.parts import TEXT_ENCODER, TEXT_ENCODER_2, VAE_DECODER, VAE_ENCODER
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.models.pipeline_model import PipelineModel

STAGE = "export-parts"
TOKENIZERS = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}


@dataclass(frozen=True)
class Part:
    """A part that a model has.

    Attributes:
        graph: makes its graph.
        problem: why it has none; empty where it has.
    """

    graph: Callable[[], ir.Model]
    problem: str


def model_parts(model: PipelineModel) -> dict[str, Part]:
    """The parts of a model by name, loaded."""
    found: dict[str, Part] = {}
    if model.asked_for == "prompt":
        pipeline = model.load_pipeline(vae=None)
        for name, tokenizer in TOKENIZERS.items():
            if (encoder := getattr(pipeline, name, None)) is not None:
                tokens = getattr(pipeline, tokenizer).model_max_length
                found[name] = _part(encoder.eval(), TEXT_CLASSES, text_encoder_graph, tokens)
    vae: Any = model.load_decoder()
    if vae is not None:
        image = (int(vae.config.in_channels), *model.image_size)
        found[VAE_DECODER] = _part(vae, DECODER_CLASSES, decoder_graph, model.sample_shape)
        found[VAE_ENCODER] = _part(vae, ENCODER_CLASSES, encoder_graph, image)
    return found


def _part(
    module: Any, classes: Sequence[str], make: Callable[[Any, Any], ir.Model], argument: Any
) -> Part:
    kind, problem = type(module).__name__, ""
    if kind not in classes:
        problem = f"expected {' or '.join(classes)}, found {kind}"
    elif getattr(module.config, "use_attention_mask", None):
        problem = "diffusers gives it a mask (use_attention_mask), and its graph takes ids alone"
    return Part(lambda: make(module, argument), problem)


class PartGraphs:
    """The graphs of a workspace's parts: those that it holds, or else made from its model."""

    def __init__(self, workspace: Workspace, model: PipelineModel) -> None:
        """Of ``workspace``, whose model is ``model``; raise InputError where what it holds is not
        whole.
        """
        self._workspace, self._model = workspace, model
        self._exported = STAGE in workspace.stages and workspace.require(STAGE).details["parts"]
        self._made: dict[str, Part] | None = None

    def load(self, name: str) -> ir.Model:
        """A part's graph; raise InputError where it has none."""
        if self._exported and name in self._exported:
            return load_graph(self._workspace.path(PARTS, name, LOWERED))
        if self._made is None:
            self._made = model_parts(self._model)
        if problem := self._made[name].problem:
            raise InputError(f"{self._model.name}: its {name} cannot be exported: {problem}")
        return self._made[name].graph()
