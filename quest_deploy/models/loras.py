"""LoRAs fused into a model before it is quantized: W + weight * (alpha / rank) * B A, after which
nothing of the LoRA is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from quest_deploy.artifacts.model_source import Lora

_ADAPTER = "lora"


def fuse_into_unet(loras: Sequence[Lora], pipeline_class: Any, unet: Any) -> None:
    """Fuse ``loras`` into ``unet``, in place, each in any layout that diffusers reads.

    Raises:
        InputError: the pipeline takes no LoRAs, or one fits nothing in it.
    """
    for lora in loras:
        state, alphas, metadata = _read(lora, pipeline_class, unet.config)
        if not any(key.startswith("unet.") for key in state):
            if any(key.startswith("text_encoder") for key in state):
                continue
            raise InputError(f"the LoRA {lora.path} has nothing for a UNet or a text encoder")
        try:
            pipeline_class.load_lora_into_unet(
                state, network_alphas=alphas, unet=unet, adapter_name=_ADAPTER, metadata=metadata
            )
            unet.fuse_lora(lora_scale=lora.weight)
            unet.unload_lora()
        except (RuntimeError, ValueError, KeyError) as e:
            raise InputError(
                f"the LoRA {lora.path} does not fit the model: {str(e).splitlines()[0]}"
            ) from e


def fuse_into_text_encoders(
    loras: Sequence[Lora], pipeline_class: Any, encoders: Mapping[str, nn.Module]
) -> None:
    """Fuse the ``loras``' parts for text encoders, given by their names in the pipeline, in
    place.
    """
    for lora in loras:
        state, alphas, metadata = _read(lora, pipeline_class, None)
        for name, encoder in encoders.items():
            if not any(key.startswith(f"{name}.") for key in state):
                continue
            try:
                pipeline_class.load_lora_into_text_encoder(
                    state,
                    alphas,
                    encoder,
                    prefix=name,
                    lora_scale=lora.weight,
                    adapter_name=_ADAPTER,
                    metadata=metadata,
                )
            except (RuntimeError, ValueError, KeyError) as e:
                raise InputError(
                    f"the LoRA {lora.path} does not fit the {name}: {str(e).splitlines()[0]}"
                ) from e
            _merge(encoder)


def _read(lora: Lora, pipeline_class: Any, unet_config: Any) -> tuple[dict[str, Any], Any, Any]:
    if not hasattr(pipeline_class, "lora_state_dict"):
        raise InputError(
            f"--lora: expected a pipeline that takes LoRAs, and {pipeline_class.__name__} does not"
        )
    extra = {} if unet_config is None else {"unet_config": unet_config}
    try:
        state, alphas, metadata = pipeline_class.lora_state_dict(
            lora.path, return_lora_metadata=True, use_safetensors=True, **extra
        )
    except Exception as e:
        raise InputError(
            f"{lora.path} cannot be read as a LoRA ({type(e).__name__}: {str(e).splitlines()[0]})"
        ) from e
    if any(key.endswith(".alpha") for key in state):
        raise InputError(
            f"the LoRA {lora.path} has alphas in a layout that diffusers leaves out; convert it to "
            "diffusers' or kohya's"
        )
    return state, alphas, metadata


def _merge(encoder: nn.Module) -> None:
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(encoder)
    encoder._hf_peft_config_loaded = False  # type: ignore[assignment]
