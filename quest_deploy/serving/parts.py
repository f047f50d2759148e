"""Engines in the place of a pipeline's text encoders and VAE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

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
from quest_deploy.backends.parts import (
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    VAE_DECODER,
    VAE_ENCODER,
    EnginePart,
    built_parts,
)
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

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
_REFUSED_OF_VAE = (
    "enable_gradient_checkpointing",
    "enable_tiling",
    "fuse_qkv_projections",
    "load_state_dict",
    "save_pretrained",
    "set_attn_processor",
    "tiled_decode",
    "tiled_encode",
)
_HARMLESS_OF_VAE = ("disable_slicing", "disable_tiling", "enable_slicing", "unfuse_qkv_projections")
"""Images are decoded one by one anyway, and as a whole."""


def engine_parts(
    workspace: Workspace, backend: str, without: Collection[str] = ()
) -> dict[str, Any]:
    """What of a pipeline of ``workspace`` has an engine of ``backend``, by its name in the
    pipeline; nothing where `quest-deploy build-parts` has not run.

    Args:
        without: what is not asked for.

    Raises:
        InputError: the engines are not up to date, were changed or cannot run here.
    """
    folders = built_parts(workspace, backend)
    found: dict[str, Any] = {
        name: PipelineTextEncoder(EnginePart(backend, folders[name]))
        for name in (TEXT_ENCODER, TEXT_ENCODER_2)
        if name in folders and name not in without
    }
    if VAE_DECODER in folders and not {"vae", "vqvae"} & set(without):
        decoder = EnginePart(backend, folders[VAE_DECODER])
        encoder = EnginePart(backend, folders[VAE_ENCODER]) if VAE_ENCODER in folders else None
        name = "vqvae" if decoder.info.kind == "VQModel" else "vae"
        found[name] = PipelineVae(decoder, encoder)
    return found


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise InputError(f"{name}: {_FIXED}")

    return refuse


def _refuse_given(**arguments: Any) -> None:
    """Raise InputError for arguments that an engine does not compute, if any is given."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise InputError(f"the engine does not compute {', '.join(sorted(given))}: {_FIXED}")


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
                a mask.
        """
        _refuse_given(attention_mask=attention_mask, **unsupported)
        ids: NDArray[np.int32] = input_ids.to(torch.int32).numpy(force=True)
        outputs = {
            name: _tensor(value, input_ids.device, self.dtype)
            for name, value in self.engine(input_ids=ids).items()
        }
        layers = range(self.config.num_hidden_layers + 1)
        states = tuple(outputs[HIDDEN_STATE.format(i)] for i in layers)
        hidden = states if output_hidden_states else None
        found: Any
        if self.engine.info.kind == "CLIPTextModelWithProjection":
            found = CLIPTextModelOutput(outputs[POOLED], outputs[LAST_STATE], hidden)
        else:
            found = BaseModelOutputWithPooling(outputs[LAST_STATE], outputs[POOLED], hidden)
        return found if return_dict is None or return_dict else found.to_tuple()


class PipelineVae(ModelMixin, ConfigMixin):
    """Engines in the place of an AutoencoderKL, or of a VQModel's decoder.

    They have no weights. Images come one by one, which bounds memory.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, decoder: EnginePart, encoder: EnginePart | None) -> None:
        """Stand in for what ``decoder``, and ``encoder`` if there is one, were made from."""
        super().__init__()
        self.decoder_engine, self.encoder_engine = decoder, encoder
        self.register_to_config(
            **{name: x for name, x in decoder.info.config.items() if not name.startswith("_")}
        )
        # Empty: accelerate's hooks ask the first parameter of a module where it is.
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name in _HARMLESS_OF_VAE:
            return lambda *arguments, **options: None
        return super().__getattr__(name)

    @property
    def dtype(self) -> torch.dtype:
        """The type that pipelines give their latents and images."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Where pipelines put their latents and images."""
        return self._place.device

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Any = None, **unsupported: Any
    ) -> Any:
        """From latents [B, C, h, w], their scaling undone, to images [B, 3, H, W]."""
        _refuse_given(**unsupported)
        images = _one_by_one(self.decoder_engine, z, IMAGE)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """From images [B, 3, H, W] to the distribution of their latents; raise InputError without
        an engine for it.
        """
        if self.encoder_engine is None:
            raise InputError(f"encode: there is no engine that encodes images; {_FIXED}")
        found = DiagonalGaussianDistribution(_one_by_one(self.encoder_engine, x, MOMENTS))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def forward(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise InputError: pipelines call ``decode`` and ``encode``."""
        raise InputError(f"forward: {_FIXED}")


def _one_by_one(engine: EnginePart, values: Tensor, output: str) -> Tensor:
    rows = [engine(**{LATENTS: x[None].float().numpy(force=True)})[output] for x in values]
    return torch.cat([_tensor(x, values.device, values.dtype) for x in rows])


for _name in _REFUSED_OF_TEXT:
    setattr(PipelineTextEncoder, _name, _refusal(_name))
for _name in _REFUSED_OF_VAE:
    setattr(PipelineVae, _name, _refusal(_name))
