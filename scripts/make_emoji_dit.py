"""Make the second embedded model again, a diffusion transformer with flow matching that draws what
`emoji` draws: its tokenizer, text encoder and transformer.

    apt-get install fonts-noto-color-emoji unicode-cldr-core
    pip install emoji==2.16.0
    python -m scripts.make_emoji_dit [--out quest_deploy/models/emoji-dit] [--work build/emoji]

It learns from the latents of the VAE that ships with `emoji`, and is judged by the same encoder
(``scripts/make_emoji_model.py``, whose ``--work`` is taken where it is there). Every stage keeps
its result in ``--work`` and goes on where it was interrupted; a GPU is used where there is one.
Nothing here knows of quantization.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from scripts.make_emoji_model import (
    DEVICE,
    SIDE,
    VAE,
    VOCABULARY,
    Training,
    drawn_latents,
    make_latents,
    make_missing,
    prompts_for,
    save_pipeline,
)

OWN = "dit"
"""The folder of this model's parts in ``--work``."""
SPECIAL = ("<pad>", "</s>", "<unk>")
"""The tokens that T5's has first."""
TEXT: dict[str, Any] = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
TRANSFORMER: dict[str, Any] = {
    "sample_size": SIDE // 8,
    "patch_size": 1,
    "in_channels": VAE["latent_channels"],
    "out_channels": VAE["latent_channels"],
    "num_layers": 6,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "cross_attention_dim": 192,
    "caption_channels": TEXT["d_model"],
    "use_additional_conditions": False,
}
SHIFT = 2.0
"""Of the schedule, in training as in use: sigma of the fraction u is SHIFT u / (1 + (SHIFT - 1) u),
after Esser et al. 2024."""
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": SHIFT,
}
EVEN_SHARE = 0.25
"""Of the fractions that are trained, that which is uniform; the others are logit-normal."""


def make_tokenizer(folder: Path, entries: list[dict[str, Any]]) -> None:
    """A T5 tokenizer whose pieces are learned from the names and keywords."""
    texts = [text for each in entries for text in (each["name"], *each["keywords"])]
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), unk_token=SPECIAL[-1]
    )
    learned.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in json.loads(learned.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    print(f"{len(pieces)} pieces")


def new_transformer() -> Any:
    """A transformer with PixArt's initial weights, which diffusers does not give it: its
    prediction is zero, and no block reads the prompt yet.
    """
    made: Any = PixArtTransformer2DModel(**TRANSFORMER)
    for name, module in made.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.startswith(("adaln_single", "caption_projection")):
            nn.init.normal_(module.weight, std=0.02)
        elif name == "proj_out" or name.endswith("attn2.to_out.0"):
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(made.pos_embed.proj.weight.data.flatten(1))
    return made


def sigmas_for(count: int, generator: torch.Generator) -> Tensor:
    """The shares of noise [count] that are trained, in (0, 1)."""
    normal = torch.randn(count, generator=generator).sigmoid()
    even = torch.rand(count, 2, generator=generator)
    fractions = normal.where(even[:, 0] >= EVEN_SHARE, even[:, 1])
    return SHIFT * fractions / (1 + (SHIFT - 1) * fractions)


def train(work: Path, steps: int, batch: int) -> None:
    """MSE of the velocity from the latents to the noise, text encoder and transformer together,
    with prompt dropout for guidance; products in bfloat16.
    """
    latents = load_file(work / "latents.safetensors")["latents"].to(DEVICE)
    entries = json.loads((work / "names.json").read_text())
    tokenizer = T5Tokenizer.from_pretrained(work / OWN / "tokenizer")
    torch.manual_seed(0)
    encoder: Any = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **TEXT)).to(DEVICE).train()
    transformer = new_transformer().to(DEVICE).train()
    # torch's fused attention takes four times as long in its backward pass here, in bfloat16.
    transformer.set_attn_processor(AttnProcessor())
    modules = {"transformer": transformer, "text_encoder": encoder}
    training = Training(work / "dit.pt", modules, steps=steps, rate=1e-3, decay=0.9995, warmup=500)

    def loss_of(generator: torch.Generator) -> Tensor:
        clean, rows = drawn_latents(latents, batch, generator)
        noise = torch.randn(clean.shape, generator=generator).to(DEVICE)
        sigmas = sigmas_for(batch, generator).to(DEVICE)
        texts = list(prompts_for(entries, rows, generator))
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            predicted = transformer(
                clean.lerp(noise, sigmas[:, None, None, None]),
                encoder_hidden_states=encoder(**tokens).last_hidden_state,
                encoder_attention_mask=tokens.attention_mask,
                timestep=sigmas * SCHEDULER["num_train_timesteps"],
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        return F.mse_loss(predicted.float(), noise - clean)

    training.run(loss_of)
    save_parts(training, work / OWN)


def save_parts(training: Training, folder: Path) -> None:
    """Write what is trained so far, in diffusers' layout."""
    for name, module in training.averaged().items():
        part: Any = module
        part.save_pretrained(folder / name)


def write_pipeline(work: Path, out: Path) -> None:
    """The pipeline, and what judges it."""
    own = work / OWN
    pipeline = PixArtSigmaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(own / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(own / "text_encoder"),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(own / "transformer"),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
    )
    save_pipeline(pipeline, work, out)


def main(
    out: Annotated[Path, typer.Option()] = Path("quest_deploy/models/emoji-dit"),
    work: Annotated[Path, typer.Option(help="What is kept between stages.")] = Path("build/emoji"),
    model: Annotated[Path, typer.Option(help="Whose VAE and judge it takes.")] = Path(
        "quest_deploy/models/emoji"
    ),
    steps: int = 15000,
    batch: int = 64,
) -> None:
    """Make the model."""
    make_latents(work, model, ("vae", "judge"))
    own = work / OWN
    own.mkdir(exist_ok=True)
    entries = json.loads((work / "names.json").read_text())
    make_missing(
        work,
        [
            (f"{OWN}/tokenizer", lambda: make_tokenizer(own / "tokenizer", entries)),
            (f"{OWN}/text_encoder", lambda: train(work, steps, batch)),
        ],
    )
    write_pipeline(work, out)


if __name__ == "__main__":
    typer.run(main)
