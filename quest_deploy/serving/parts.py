"""Engines in the place of a pipeline's text encoders and VAE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import diffusers
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from exporters.part_info import HIDDEN_STATE, IMAGE, LAST_STATE, LATENTS, MOMENTS, POOLED, last_norm
from exporters.parts import DECODER_CLASSES
from quest_deploy.backends.parts import (
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    VAE_DECODER,
    VAE_ENCODER,
    EnginePart,
    built_parts,
)
from quest_deploy.errors import InputError
from quest_deploy.serving.stand_in import EngineStandIn, own_methods, refusal

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import numpy as np
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
_REFUSED_OF_MODELS = ("enable_gradient_checkpointing", "load_state_dict", "save_pretrained")
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
        name: PipelineTextEncoder(_prepared(backend, folders[name]))
        for name in (TEXT_ENCODER, TEXT_ENCODER_2)
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


def _refuse_any(**arguments: Any) -> None:
    """Raise InputError for arguments that an engine does not compute, if any asks for something."""
    asking = [name for name, x in arguments.items() if x is not None and x is not False]
    if asking:
        raise InputError(f"the engine does not compute {', '.join(sorted(asking))}: {_FIXED}")


def _tensor(values: NDArray[Any], like: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(like, dtype)


class PipelineTextEncoder(transformers.PreTrainedModel):  # type: ignore[misc]
    """An engine in the place of a CLIP text encoder; it has no weights but those of its last norm.

    ``to`` moves it in name: the engine computes where it was built for.
    """

    config_class = transformers.CLIPTextConfig

    def __init__(self, engine: EnginePart) -> None:
        """Stand in for the encoder that ``engine`` was made from."""
        super().__init__(transformers.CLIPTextConfig.from_dict(engine.info.config))
        self.engine = engine
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
        ids: NDArray[np.int32] = input_ids.to(torch.int32).numpy(force=True)
        outputs = {
            name: _tensor(value, input_ids.device, self.dtype)
            for name, value in self.engine(input_ids=ids).items()
        }
        layers = range(self.config.num_hidden_layers + 1)
        states = tuple(outputs[HIDDEN_STATE.format(i)] for i in layers)
        hidden = states if output_hidden_states else None
        encoded: Any
        if self.engine.info.kind == "CLIPTextModelWithProjection":
            encoded = CLIPTextModelOutput(outputs[POOLED], outputs[LAST_STATE], hidden)
        else:
            encoded = BaseModelOutputWithPooling(outputs[LAST_STATE], outputs[POOLED], hidden)
        return encoded if return_dict is None or return_dict else encoded.to_tuple()


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
        images = _one_by_one(self.decoder_engine, z, IMAGE)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """From images [B, 3, H, W] to the distribution of their latents; raise InputError without
        an engine for it.
        """
        if self.encoder_engine is None:
            raise InputError(f"encode: there is no engine that encodes images; {_FIXED}")
        latents = DiagonalGaussianDistribution(_one_by_one(self.encoder_engine, x, MOMENTS))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def forward(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise InputError: pipelines call ``decode`` and ``encode``."""
        raise InputError(f"forward: {_FIXED}")


def _one_by_one(engine: EnginePart, values: Tensor, output: str) -> Tensor:
    rows = [engine(**{LATENTS: x[None].float().numpy(force=True)})[output] for x in values]
    return torch.cat([_tensor(x, values.device, values.dtype) for x in rows])


for _name in _REFUSED_OF_TEXT:
    setattr(PipelineTextEncoder, _name, refusal(_name, _FIXED))
for _name in _REFUSED_OF_MODELS:  # which __getattr__ is not asked for: the base class has them
    setattr(PipelineVae, _name, refusal(_name, _FIXED))
