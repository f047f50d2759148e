"""Make what is judged with the embedded model again: a LoRA that draws in blue, and a ControlNet
that follows edges.

    apt-get install fonts-noto-color-emoji unicode-cldr-core
    pip install emoji==2.16.0
    python -m scripts.make_emoji_adapters [--out examples/adapters] [--work build/emoji]

Both are trained for the UNet that ships, from the pictures that it was trained from
(``scripts/make_emoji_model.py``, whose ``--work`` is taken where it is there). Every stage keeps
its result and goes on where it was interrupted. Nothing here knows of quantization.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFilter, ImageOps
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.make_emoji_model import (
    DEVICE,
    PARTS,
    PROMPT_DROPOUT,
    SCHEDULER,
    VARIANTS,
    WEIGHTS,
    Training,
    can_flip,
    make_latents,
    make_missing,
    pictures_of,
    timestep_shares,
    token_ids,
    variants_of,
)

LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 4,
    "init_lora_weights": "gaussian",
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
}
"""Every product of the attention blocks."""
CONDITION_CHANNELS = (8, 16, 32, 64)
"""Of the ControlNet's first layers, each of half the side: the decoder's factor is 8."""
WARMUP = 50
STYLE, EDGES = "blue.safetensors", "edges"
BLUE = (1.6, 1.0, 0.6)
"""The powers that make red, green and blue of a lightness in [0, 1]."""
LIGHTNESS = (0.299, 0.587, 0.114)
"""The shares of red, green and blue in it (ITU-R BT.601)."""
LEAST_EDGE = 64
"""Of what Pillow's FIND_EDGES makes of a grey picture, in 0 to 255, that which is an edge."""


def blue_of(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] in blue: of one hue, white and black as they are."""
    share = torch.tensor(LIGHTNESS, device=pictures.device)[:, None, None]
    light = ((pictures + 1) / 2 * share).sum(1, keepdim=True).clamp(0, 1)
    return light ** torch.tensor(BLUE, device=pictures.device)[:, None, None] * 2 - 1


def edges_of(pictures: Tensor) -> Tensor:
    """The edges of pictures [N, 3, H, W] in [-1, 1]: uint8 [N, H, W], 255 on an edge, else 0."""
    arrays = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    found = []
    for array in arrays:
        edges = Image.fromarray(array).convert("L").filter(ImageFilter.FIND_EDGES)
        # The filter leaves the outermost pixels as they are.
        inside = ImageOps.expand(ImageOps.crop(edges, 1), 1)
        found.append(np.asarray(inside) >= LEAST_EDGE)
    return torch.from_numpy(np.stack(found)).byte() * 255


@torch.no_grad()
def encode_styled(work: Path) -> None:
    """The latents of the pictures in blue, float32 [N, C, 8, 8], scaled."""
    pictures, _ = pictures_of(work)
    vae: Any = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE).eval()
    styled = blue_of(pictures)
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in track(styled.split(64), "blue")])
    scaled = (latents * vae.config.scaling_factor).contiguous()
    save_file({"latents": scaled}, work / "blue.safetensors")


@torch.no_grad()
def encode_edges(work: Path) -> None:
    """The edges of the pictures and of their shifted and mirrored copies, uint8
    [1 + VARIANTS, N, 64, 64]: of the same copies as ``latents.safetensors``.
    """
    pictures, entries = pictures_of(work)
    copies = variants_of(pictures, can_flip(entries))
    save_file(
        {"edges": torch.stack([edges_of(x) for x in track(copies, "edges", 1 + VARIANTS)])},
        work / "edges.safetensors",
    )


@torch.no_grad()
def encode_names(work: Path, model: Path) -> None:
    """What the text encoder makes of no prompt and of the names, float32 [1 + N, 24, W]."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder: Any = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    encoder.to(DEVICE).eval()
    names = [each["name"] for each in json.loads((work / "names.json").read_text())]
    ids = token_ids(tokenizer, ["", *names])
    save_file(
        {"states": torch.cat([encoder(x).last_hidden_state for x in ids.split(64)])},
        work / "states.safetensors",
    )


class Lesson:
    """Noisy latents, their noise, timesteps and text states, drawn as the UNet's training does."""

    def __init__(self, work: Path, batch: int) -> None:
        self.batch = batch
        self.states = load_file(work / "states.safetensors")["states"].to(DEVICE)
        self.scheduler: Any = DDIMScheduler(**SCHEDULER)
        self.shares = timestep_shares(self.scheduler)

    def draw(self, latents: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The noisy ``latents`` [B, C, 8, 8] of the pictures ``rows`` [B], the timesteps, the
        states and the noise.
        """
        noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
        timesteps = torch.multinomial(self.shares, self.batch, True, generator=generator)
        asked = torch.rand(self.batch, generator=generator) >= PROMPT_DROPOUT
        states = self.states[(1 + rows) * asked]
        timesteps = timesteps.to(DEVICE)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, states, noise


def train_lora(work: Path, model: Path, steps: int, batch: int) -> None:
    """Epsilon-MSE on the pictures in blue, of the LoRA alone."""
    latents = load_file(work / "blue.safetensors")["latents"].to(DEVICE)
    lesson = Lesson(work, batch)
    unet = _frozen_unet(model)
    torch.manual_seed(2)
    unet.add_adapter(LoraConfig(**LORA))
    training = Training(
        work / "lora.pt", {"unet": unet}, steps=steps, rate=2e-3, decay=0.99, warmup=WARMUP
    )

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        noisy, timesteps, states, noise = lesson.draw(latents[rows], rows, generator)
        return F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=states).sample, noise)

    training.run(loss_of)
    layers = get_peft_model_state_dict(training.averaged()["unet"])
    StableDiffusionPipeline.save_lora_weights(
        work / "lora",
        unet_lora_layers={name: value.cpu().half() for name, value in layers.items()},
        weight_name=STYLE,
    )


def train_controlnet(work: Path, model: Path, steps: int, batch: int) -> None:
    """Epsilon-MSE on the pictures and their copies with their edges, of the ControlNet alone."""
    latents = load_file(work / "latents.safetensors")["latents"].to(DEVICE)
    edges = load_file(work / "edges.safetensors")["edges"]
    lesson = Lesson(work, batch)
    unet = _frozen_unet(model)
    torch.manual_seed(3)
    controlnet: Any = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=CONDITION_CHANNELS
    )
    controlnet.to(DEVICE).train()
    training = Training(
        work / "controlnet.pt",
        {"controlnet": controlnet},
        steps=steps,
        rate=1e-3,
        decay=0.99,
        warmup=WARMUP,
    )

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(latents.shape[1], (batch,), generator=generator)
        variants = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[variants, rows]
        noisy, timesteps, states, noise = lesson.draw(clean, rows, generator)
        condition = edges[variants, rows].to(DEVICE)[:, None].expand(-1, 3, -1, -1) / 255
        down, middle = controlnet(
            noisy, timesteps, states, controlnet_cond=condition, return_dict=False
        )
        predicted = unet(
            noisy,
            timesteps,
            encoder_hidden_states=states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return F.mse_loss(predicted, noise)

    training.run(loss_of)
    averaged: Any = training.averaged()["controlnet"]
    averaged.cpu().half().save_pretrained(work / "controlnet")


def _frozen_unet(model: Path) -> Any:
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    return unet.to(DEVICE).eval().requires_grad_(False)


def write_adapters(work: Path, out: Path) -> None:
    """Both in FP16, in diffusers' layouts."""
    (out / EDGES).mkdir(parents=True, exist_ok=True)
    files = {
        work / "lora" / STYLE: out / STYLE,
        work / "controlnet" / "config.json": out / EDGES / "config.json",
        work / "controlnet" / WEIGHTS: out / EDGES / WEIGHTS,
    }
    for source, target in files.items():
        target.write_bytes(source.read_bytes())
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
    config = json.loads((out / EDGES / "config.json").read_text())
    config.pop("_name_or_path", None)  # of this machine
    (out / EDGES / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Option()] = Path("examples/adapters"),
    work: Annotated[Path, typer.Option(help="What is kept between stages.")] = Path("build/emoji"),
    model: Annotated[Path, typer.Option(help="What they are for.")] = Path(
        "quest_deploy/models/emoji"
    ),
    lora_steps: int = 400,
    lora_batch: int = 32,
    controlnet_steps: int = 1500,
    controlnet_batch: int = 32,
) -> None:
    """Make the adapters."""
    make_latents(work, model, PARTS)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("states.safetensors", lambda: encode_names(work, model)),
        ("blue.safetensors", lambda: encode_styled(work)),
        (f"lora/{STYLE}", lambda: train_lora(work, model, lora_steps, lora_batch)),
        ("edges.safetensors", lambda: encode_edges(work)),
        (
            f"controlnet/{WEIGHTS}",
            lambda: train_controlnet(work, model, controlnet_steps, controlnet_batch),
        ),
    ]
    make_missing(work, stages)
    write_adapters(work, out)


if __name__ == "__main__":
    typer.run(main)
