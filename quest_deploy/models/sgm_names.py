"""The names that Stability's own code (sgm, and CompVis before it) has for the layers of a UNet,
under which LoRAs of Stable Diffusion XL are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def sgm_names(unet: Any) -> dict[str, str]:
    """By the name of each convolution and linear layer of ``unet``, a diffusers UNet, the name that
    Stability's code has for it; the layers whose blocks have no counterpart there are left out.
    """
    blocks = dict(_blocks(unet))
    names = {}
    for name in (name for name, _ in unet.named_modules()):
        if name in _OUTSIDE:
            names[name] = _OUTSIDE[name]
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None:
            inside = name.removeprefix(f"{block}.")
            if ".resnets." in block:
                inside = _IN_RESNET.get(inside, inside)
            elif ".downsamplers." in block:
                inside = "op"
            names[name] = f"{blocks[block]}.{inside}"
    return names


def _blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Each ResBlock, transformer and resampling by its name in diffusers and in Stability's code,
    which counts them through all levels.
    """
    number = 1
    for level, block in enumerate(getattr(unet, "down_blocks", ())):
        for i in range(len(block.resnets)):
            yield f"down_blocks.{level}.resnets.{i}", f"input_blocks.{number}.0"
            yield f"down_blocks.{level}.attentions.{i}", f"input_blocks.{number}.1"
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    for i in (0, 1):
        yield f"mid_block.resnets.{i}", f"middle_block.{2 * i}"
    yield "mid_block.attentions.0", "middle_block.1"
    number = 0
    for level, block in enumerate(getattr(unet, "up_blocks", ())):
        for i in range(len(block.resnets)):
            yield f"up_blocks.{level}.resnets.{i}", f"output_blocks.{number}.0"
            yield f"up_blocks.{level}.attentions.{i}", f"output_blocks.{number}.1"
            number += 1
        place = 2 if getattr(block, "attentions", None) else 1
        yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{number - 1}.{place}"
