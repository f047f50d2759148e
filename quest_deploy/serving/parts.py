"""Engines in the place of a pipeline's text encoders and VAE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import diffusers
import numpy as np
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from exporters.graph_info import input_sizes
from exporters.part_info import (
    HIDDEN_STATE,
    IDS,
    IMAGE,
    LAST_STATE,
    LATENTS,
    MASK,
    MOMENTS,
    POOLED,
    last_norm,
)
from exporters.parts import DECODER_CLASSES, TEXT_CLASSES
from quest_deploy.backends.parts import VAE_DECODER, VAE_ENCODER, EnginePart, built_parts
from quest_deploy.errors import InputError
from quest_deploy.models.pipeline_model import TEXT_ENCODERS
from quest_deploy.serving.stand_in import EngineStandIn, own_methods, refusal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from quest_deploy.artifacts.workspace import Workspace

_FIXED = (
    "an engine's weights and graph are fixed when it is built; give the float part to "
    "load_pipeline by its name, such as text_encoder= or vae="
)
_REFUSED_OF_TEXT = (
    "add_adapter",
    "enable_adapters",
    "get_input_embeddings",
    "gradient_checkpointing_enable",
    "load_adapter",
    "load_state_dict",
    "resize_token_embeddings",
    "save_pretrained",
    "set_adapter",
    "set_input_embeddings",
)
_HARMLESS_OF_VAE = ("disable_slicing", "disable_tiling", "enable_slicing", "unfuse_qkv_projections")
"""Images are decoded one by one anyway, and as a whole."""
_REFUSED_OF_VAE = frozenset().union(
    *(own_methods(getattr(diffusers, x), ModelMixin, ConfigMixin) for x in DECODER_CLASSES)
) - {*_HARMLESS_OF_VAE}
_ABSENT_OF_VAE = ("decoder", "encoder", "quant_conv", "quantize")
"""The modules of a VAE, which an engine does not have."""


def engine_parts(
    workspace: Workspace, backend: str, without: Collection[str] = ()
) -> dict[str, Any]:
    """Open the engines that replace parts of the pipeline of ``workspace``, by the part's name in
    the pipeline; none where `quest-deploy build-parts` has not run.

    Args:
        without: the names of parts that are not replaced.

    Raises:
        InputError: the engines are not up to date, were changed or cannot run here.
    """
    left_out = {*without}
    if {"vae", "vqvae"} & left_out:
        left_out |= {VAE_DECODER, VAE_ENCODER}
    folders = built_parts(workspace, backend, left_out)
    parts: dict[str, Any] = {
        name: _text_encoder(_prepared(backend, folders[name]))
        for name in TEXT_ENCODERS
        if name in folders
    }
    if VAE_DECODER in folders:
        decoder = _prepared(backend, folders[VAE_DECODER])
        encoder = EnginePart(backend, folders[VAE_ENCODER]) if VAE_ENCODER in folders else None
        name = "vqvae" if decoder.info.kind == "VQModel" else "vae"
        parts[name] = PipelineVae(decoder, encoder)
    return parts


def _prepared(backend: str, folder: Path) -> EnginePart:
    """An engine that every image needs."""
    engine = EnginePart(backend, folder)
    engine.prepare()
    return engine


def _text_encoder(engine: EnginePart) -> PipelineTextEncoder:
    pools = any(value.name == POOLED for value in engine.graph.graph.outputs)
    return PipelineCLIP(engine) if pools else PipelineTextEncoder(engine)


def _refuse_any(**arguments: Any) -> None:
    """Raise InputError for arguments that an engine does not compute, if any asks for something."""
    asking = [name for name, x in arguments.items() if x is not None and x is not False]
    if asking:
        raise InputError(f"the engine does not compute {', '.join(sorted(asking))}: {_FIXED}")


def _tensor(values: NDArray[Any], like: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(like, dtype)


def _one_by_one(engine: EnginePart, **feeds: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The outputs for inputs [B, ...], a row at a time: what is compiled for several rows has
    weights of its own.
    """
    count = len(next(iter(feeds.values())))
    rows = [engine(**{name: x[i : i + 1] for name, x in feeds.items()}) for i in range(count)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def text_output(kind: str, outputs: Mapping[str, Tensor], *, states: bool = False) -> Any:
    """What a text encoder of the class ``kind`` gives.

    Args:
        outputs: those of its graph, by name.
        states: whether with the states after each layer.
    """
    if POOLED not in outputs:
        return BaseModelOutput(outputs[LAST_STATE])
    layers = range(len(outputs) - 2)
    hidden = tuple(outputs[HIDDEN_STATE.format(i)] for i in layers) if states else None
    if kind == "CLIPTextModelWithProjection":
        return CLIPTextModelOutput(outputs[POOLED], outputs[LAST_STATE], hidden)
    return BaseModelOutputWithPooling(outputs[LAST_STATE], outputs[POOLED], hidden)


class PipelineTextEncoder(transformers.PreTrainedModel):  # type: ignore[misc]
    """An engine in the place of a text encoder that reads a mask, such as T5. It has no weights.

    ``to`` moves it in name: the engine computes where it was built for.
    """

    def __init__(self, engine: EnginePart) -> None:
        """Stand in for the encoder that ``engine`` was made from."""
        engine.check_kind(TEXT_CLASSES)
        kind = getattr(transformers, engine.info.kind)
        super().__init__(kind.config_class.from_dict(engine.info.config))
        self.engine = engine
        # Empty: the type and the place of a model are those of its first parameter.
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> Any:
        """Encode as the text encoder of transformers does.

        Args:
            input_ids: [B, T], T at most as many as the engine reads.
            attention_mask: [B, T], 0 for padding; None for none.

        Raises:
            InputError: more tokens, or an argument that the engine does not compute.
        """
        _refuse_any(output_hidden_states=output_hidden_states, **unsupported)
        tokens, most = input_ids.shape[1], input_sizes(self.engine.graph)[IDS][1] or 0
        if tokens > most:
            raise InputError(
                f"input_ids: expected at most {most} tokens, found {tokens}; give the pipeline a "
                f"max_sequence_length that is {tokens - most} less: {_FIXED}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # What is masked changes nothing, so that one engine reads prompts of all lengths.
        outputs = self._outputs(
            **{
                name: nn.functional.pad(x.to(torch.int32), (0, most - tokens))
                for name, x in ((IDS, input_ids), (MASK, mask))
            }
        )
        read = {name: x[:, :tokens] for name, x in outputs.items()}
        return self._output(read, return_dict, states=False)

    def _outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The engine's outputs by name."""
        feeds = {name: x.to(torch.int32).numpy(force=True) for name, x in inputs.items()}
        found, device = _one_by_one(self.engine, **feeds), inputs[IDS].device
        return {name: _tensor(x, device, self.dtype) for name, x in found.items()}

    def _output(
        self, outputs: Mapping[str, Tensor], return_dict: bool | None, *, states: bool
    ) -> Any:
        encoded = text_output(self.engine.info.kind, outputs, states=states)
        return encoded if return_dict is None or return_dict else encoded.to_tuple()


class PipelineCLIP(PipelineTextEncoder):
    """An engine in the place of a CLIP text encoder; it has no weights but those of its last
    norm.
    """

    def __init__(self, engine: EnginePart) -> None:
        """See :class:`PipelineTextEncoder`."""
        super().__init__(engine)
        norm = nn.LayerNorm(self.config.hidden_size, self.config.layer_norm_eps)
        norm.load_state_dict(
            {name: torch.from_numpy(x.copy()) for name, x in last_norm(engine.graph).items()}
        )
        self.final_layer_norm = norm.requires_grad_(requires_grad=False).eval()

    @property
    def text_model(self) -> Any:
        """What pipelines take the last norm from, for ``clip_skip``."""
        return SimpleNamespace(final_layer_norm=self.final_layer_norm)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> Any:
        """Encode as CLIP's text models do.

        Args:
            input_ids: [B, T], T the tokenizer's length.

        Raises:
            InputError: another length, or an argument that the engine does not compute, such as
                a mask that leaves tokens out.
        """
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        _refuse_any(attention_mask=attention_mask, **unsupported)
        outputs = self._outputs(input_ids=input_ids)
        return self._output(outputs, return_dict, states=bool(output_hidden_states))


class PipelineVae(EngineStandIn):
    """Engines in the place of a VAE, or of its decoder alone. Images come one by one, which bounds
    memory.
    """

    fixed, harmless = _FIXED, _HARMLESS_OF_VAE
    refused_methods, absent = _REFUSED_OF_VAE, _ABSENT_OF_VAE
    use_slicing = use_tiling = False

    def __init__(self, decoder: EnginePart, encoder: EnginePart | None) -> None:
        """Stand in for what ``decoder``, and ``encoder`` if there is one, were made from."""
        super().__init__()
        decoder.check_kind(DECODER_CLASSES)
        self.decoder_engine, self.encoder_engine = decoder, encoder
        self.register_to_config(
            **{name: x for name, x in decoder.info.config.items() if not name.startswith("_")}
        )

    @property
    def post_quant_conv(self) -> Any:
        """What pipelines take the type of their latents from, where this is in float16."""
        return SimpleNamespace(parameters=lambda: iter([self._place]))

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Any = None, **unsupported: Any
    ) -> Any:
        """From latents [B, C, h, w], their scaling undone, to images [B, 3, H, W]."""
        _refuse_any(**unsupported)
        images = _images(self.decoder_engine, z, IMAGE)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """From images [B, 3, H, W] to the distribution of their latents; raise InputError without
        an engine for it.
        """
        if self.encoder_engine is None:
            raise InputError(f"encode: there is no engine that encodes images; {_FIXED}")
        latents = DiagonalGaussianDistribution(_images(self.encoder_engine, x, MOMENTS))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def forward(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise InputError: pipelines call ``decode`` and ``encode``."""
        raise InputError(f"forward: {_FIXED}")


def _images(engine: EnginePart, values: Tensor, output: str) -> Tensor:
    found = _one_by_one(engine, **{LATENTS: values.float().numpy(force=True)})
    return _tensor(found[output], values.device, values.dtype)


for _name in _REFUSED_OF_TEXT:
    setattr(PipelineTextEncoder, _name, refusal(_name, _FIXED))
PipelineVae.save_pretrained = refusal("save_pretrained", _FIXED)  # type: ignore[method-assign]
