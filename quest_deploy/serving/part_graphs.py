"""Graphs of the text encoders and the VAE: exported by `quest-deploy export-parts`, or made where
that has not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from exporters.graph_info import load_graph
from exporters.parts import (
    DECODER_CLASSES,
    ENCODER_CLASSES,
    MASKED_CLASSES,
    TEXT_CLASSES,
    decoder_graph,
    encoder_graph,
    text_encoder_graph,
)
from quest_deploy.artifacts.workspace import PARTS
from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.parts import TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.ip_adapters import IMAGE_PARTS
from quest_deploy.models.pipeline_model import DECODERS, TEXT_ENCODERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import onnx_ir as ir

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.models.pipeline_model import PipelineModel

STAGE = "export-parts"


@dataclass(frozen=True)
class Part:
    """A part that a model has.

    Attributes:
        graph: loads it and makes its graph.
        problem: why no engine can stand in for it; empty where one can.
    """

    graph: Callable[[], ir.Model]
    problem: str


def model_parts(model: PipelineModel) -> dict[str, Part]:
    """The parts of a model by name. None is loaded before its graph is asked for."""
    parts: dict[str, Part] = {}
    of_text = model.asked_for == "prompt"
    for name, kind in _classes(model, TEXT_ENCODERS).items() if of_text else ():
        problem = _problem(kind, TEXT_CLASSES)
        if not problem and takes_mask(model):
            problem = "diffusers gives it a mask (use_attention_mask), and a graph takes ids alone"
        parts[name] = Part(partial(_text_graph, model, name), problem)
    for kind in list(_classes(model, DECODERS).values())[:1]:
        problem = _problem(kind, DECODER_CLASSES)
        parts[VAE_DECODER] = Part(partial(_decoder_graph, model), problem)
        parts[VAE_ENCODER] = Part(partial(_encoder_graph, model), _problem(kind, ENCODER_CLASSES))
    return parts


def takes_mask(model: PipelineModel) -> bool:
    """Whether diffusers gives the text encoder a mask that its graph does not read, as it does
    where a sole CLIP asks for it.
    """
    kinds = list(_classes(model, TEXT_ENCODERS).values())
    path = model.folder / TEXT_ENCODER / "config.json"
    if len(kinds) != 1 or kinds[0] in MASKED_CLASSES or not path.is_file():
        return False
    return bool(read_json(path).get("use_attention_mask"))


def _classes(model: PipelineModel, names: Sequence[str]) -> dict[str, str]:
    """The classes of those of the pipeline's parts that it has, by name."""
    entries = {name: model.index.get(name, (None, None)) for name in names}
    return {name: kind for name, (library, kind) in entries.items() if library is not None}


def _problem(kind: str, classes: Collection[str]) -> str:
    return "" if kind in classes else f"expected {' or '.join(classes)}, found {kind}"


def without_modules(model: PipelineModel, name: str | None = None) -> Any:
    """The model's pipeline with its tokenizers, and of its encoders and decoders with that of
    ``name`` alone, its weights to be read, not changed.
    """
    large = {*TEXT_ENCODERS, *DECODERS, *IMAGE_PARTS} - {name}
    unused: dict[str, Any] = {each: None for each in large if each in model.index}
    return model.load_pipeline(narrow=True, **unused)


def _text_graph(model: PipelineModel, name: str) -> ir.Model:
    pipeline = without_modules(model, name)
    return text_encoder_graph(getattr(pipeline, name).eval(), _tokens(model, pipeline, name))


def _tokens(model: PipelineModel, pipeline: Any, name: str) -> int:
    """How many token ids a text encoder reads at most."""
    if model.network.prompt_encoder is None:
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        return int(tokenizer.model_max_length)
    tokens: int = model.network.prompt_encoder(pipeline).tokens[TEXT_ENCODERS.index(name)].length
    return tokens


def _decoder_graph(model: PipelineModel) -> ir.Model:
    return decoder_graph(model.load_decoder(), model.sample_shape)


def _encoder_graph(model: PipelineModel) -> ir.Model:
    encoder = model.load_decoder()
    return encoder_graph(encoder, (int(encoder.config.in_channels), *model.image_size))


class PartGraphs:
    """The graphs of a package's parts: those that the workspace holds, or else made from its model.
    One that no engine can stand in for in a pipeline can be packaged all the same, but for what is
    refused.

    Attributes:
        encoders: the names of the text encoders.
        has_decoder: whether the model has latents to decode.
        weights: how the weights of each that was loaded are stored, by name.
    """

    def __init__(self, workspace: Workspace, model: PipelineModel) -> None:
        """Of ``workspace``, whose model is ``model``.

        Raises:
            InputError: a part cannot be packaged, or what the workspace holds is not whole.
        """
        self._workspace, self._parts = workspace, model_parts(model)
        self.encoders = [name for name in TEXT_ENCODERS if name in self._parts]
        self.has_decoder = VAE_DECODER in self._parts
        if self.encoders and takes_mask(model):
            path = model.folder / TEXT_ENCODER / "config.json"
            raise InputError(
                f"{path}: use_attention_mask is not supported in a package, whose text encoder "
                "takes token ids alone; use quest_deploy.load_pipeline"
            )
        # Of a UNet's sole text encoder the last states are enough.
        joined = model.network.prompt_encoder is not None or len(self.encoders) > 1
        needed = self.encoders if joined else []
        for name in [*needed, *([VAE_ENCODER] if model.channels.image else [])]:
            if problem := self._parts[name].problem:
                raise InputError(
                    f"{model.name}: its {name} cannot be packaged: {problem}; use "
                    "quest_deploy.load_pipeline"
                )
        exported = STAGE in workspace.stages
        self._exported = workspace.require(STAGE).details if exported else {"parts": {}}
        self.weights: dict[str, str] = {}

    def load(self, name: str) -> ir.Model:
        """A part's graph."""
        if name in self._exported["parts"]:
            self.weights[name] = self._exported["weights"]
            return load_graph(self._workspace.path(PARTS, name, LOWERED))
        self.weights[name] = "fp32"
        return self._parts[name].graph()
