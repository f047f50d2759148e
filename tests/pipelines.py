"""Small pipelines with random weights, saved in the Hugging Face Hub's own layout, one for each family. Import as ``tests.pipelines``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

TOKENS = 8
"""What a prompt is padded to."""
WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "house")
"""Words that are one token each; others are spelled."""
LATENTS = 8
CLASSES = 5
TEXT_WIDTH = 16
SDXL_WIDTHS = (16, 24)
TIME_WIDTH = 8
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
BASE = {
    "sample_size": LATENTS,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}
CROSS_ATTENTION = {
    **BASE,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
}


def text_to_image(folder: Path, **unet: Any) -> Path:
    """A StableDiffusionPipeline; ``unet`` changes its UNet's configuration. Its images are 16x16."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    config = {**CROSS_ATTENTION, "cross_attention_dim": TEXT_WIDTH, **unet}
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(TEXT_WIDTH),
        tokenizer=tokenizer(folder / "made-from"),
        unet=_seeded(lambda: UNet2DConditionModel(**config)),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def v_prediction(folder: Path) -> Path:
    """:func:`text_to_image` as Stable Diffusion 2.1 has it: v-prediction, linear projections, heads for each level."""
    saved = text_to_image(folder, use_linear_projection=True, transformer_layers_per_block=(1, 2), upcast_attention=True)
    path = saved / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return saved


def text_to_image_xl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline: two text encoders, added conditions, several transformer layers a block."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    config = {
        **CROSS_ATTENTION,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": sum(SDXL_WIDTHS),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": SDXL_WIDTHS[1] + 6 * TIME_WIDTH,
    }
    words = tokenizer(folder / "made-from")
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(SDXL_WIDTHS[0]),
        text_encoder_2=_text_encoder(SDXL_WIDTHS[1], projected=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=_seeded(lambda: UNet2DConditionModel(**config)),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )
    pipeline.save_pretrained(folder)
    return folder


def unconditional(folder: Path) -> Path:
    """An LDMPipeline: a UNet2DModel with attention blocks and resampling ResBlocks, and a vector-quantizing decoder."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    unet = {
        **BASE,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": 8,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    }
    vqvae = _seeded(lambda: VQModel(block_out_channels=(8, 8), norm_num_groups=4, **_sides(2), num_vq_embeddings=32))
    LDMPipeline(vqvae, _seeded(lambda: UNet2DModel(**unet)), DDIMScheduler(**SCHEDULER)).save_pretrained(folder)
    return folder


def class_tokens(folder: Path) -> Path:
    """Class-conditional latent diffusion: one token a class, from a table whose last row is the class of no class."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    unconditional(folder)
    config = {**CROSS_ATTENTION, "in_channels": 3, "out_channels": 3, "cross_attention_dim": TEXT_WIDTH}
    _seeded(lambda: UNet2DConditionModel(**config)).save_pretrained(folder / "unet")  # type: ignore[operator]
    table = torch.randn(CLASSES + 1, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))
    save_file({"weight": table}, folder / "class_embedding.safetensors")
    _rewrite_index(folder, {"_class_name": "ClassConditionalPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    return folder


def class_labels(folder: Path) -> Path:
    """Class-conditional latent diffusion whose UNet2DModel embeds the label itself."""
    from diffusers import UNet2DModel

    unconditional(folder)
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    config = {**BASE, **blocks, "in_channels": 3, "out_channels": 3, "num_class_embeds": CLASSES}
    _seeded(lambda: UNet2DModel(**config)).save_pretrained(folder / "unet")  # type: ignore[operator]
    _rewrite_index(folder, {"_class_name": "ClassConditionalPipeline"})
    return folder


PIPELINES: dict[str, Callable[[Path], Path]] = {
    "sd": text_to_image,
    "sd-v": v_prediction,
    "sdxl": text_to_image_xl,
    "ldm": unconditional,
    "class-tokens": class_tokens,
    "class-labels": class_labels,
}


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows ``WORDS`` and the 256 bytes; its vocabulary is written into ``folder``."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
    merges = list(dict.fromkeys(merges))
    entries = [*characters, *(f"{c}</w>" for c in characters), *(m.replace(" ", "") for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(dict.fromkeys(entries))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def _text_encoder(width: int, *, projected: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # a tokenizer's own ids count
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPTextConfig(vocab_size=600, max_position_embeddings=TOKENS, projection_dim=width, **shape, **ends)
    return _seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, **_sides(2)}
    return _seeded(lambda: AutoencoderKL(**shape, sample_size=2 * LATENTS))


def _sides(levels: int) -> dict[str, tuple[str, ...]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def _rewrite_index(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
