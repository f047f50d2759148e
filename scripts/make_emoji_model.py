"""Make the embedded text-to-image model `emoji` again from nothing: pictures, tokenizer, VAE, text
encoder, UNet, and the encoders that judge it.

    apt-get install fonts-noto-color-emoji unicode-cldr-core
    pip install emoji==2.16.0
    python scripts/make_emoji_model.py [--out quest_deploy/models/emoji] [--work build/emoji]

Every stage keeps its result in ``--work`` and goes on where it was interrupted. A few hours on two
cores; a GPU is used where there is one. ``--start FOLDER`` trains the UNet and the text encoder of
such a model further and keeps its other parts. Nothing here knows of quantization.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import emoji
import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
"""Unicode's keywords for emoji: annotations/en.xml and annotationsDerived/en.xml."""
FONT_SIZE = 109
"""The one size of the font's pictures."""
CELL = (136, 128)
SIDE = 64
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIRECTED = ("left", "right", "clock", "arrow", "button", "keycap", "hand", "letter", "input")
"""A picture with one of these words in its name is another one when it is mirrored."""
TOKENS = 24
VOCABULARY = 1600
START, END = "<|startoftext|>", "<|endoftext|>"
PARTS = ("tokenizer", "vae", "judge")
"""What stays as it is where a made model is trained further."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAVE_SECONDS = 120.0
MAX_SHIFT = 2
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": SIDE,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "projection_dim": 128,
}
UNET: dict[str, Any] = {
    "sample_size": SIDE // 8,
    "in_channels": VAE["latent_channels"],
    "out_channels": VAE["latent_channels"],
    "layers_per_block": 1,
    "block_out_channels": (64, 96, 96),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT["hidden_size"],
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
JUDGE_WIDTH = 64
"""Of the embeddings by which the judge compares pictures and names."""
VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 8,
}
"""Of the judge's image encoder."""
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
VARIANTS, PLAIN_SHARE = 12, 0.75
"""Shifted and mirrored copies of each picture that the UNet learns from, and how often it learns
from the picture as it is: a shift by part of a latent is another picture to it.
"""
PROMPT_DROPOUT, KEYWORDS_SHARE = 0.1, 0.25
MOST_SNR = 5.0
"""Above it a timestep is the more seldom trained the larger its signal-to-noise ratio: little is
left to learn there."""
LEAST_SHARE = 0.25
"""Of how often any timestep is trained, that which all have alike."""


def draw_pictures(work: Path) -> None:
    """The pictures, uint8 [N, 3, 64, 64], and what each is called: a name and keywords."""
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    known = _keywords()
    pictures, entries, seen = [], [], set()
    for text, facts in emoji.EMOJI_DATA.items():
        if facts["status"] != emoji.STATUS["fully_qualified"] or _is_left_out(text):
            continue
        canvas = Image.new("RGB", CELL, "white")
        ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
        square = Image.new("RGB", (CELL[0], CELL[0]), "white")
        square.paste(canvas, (0, (CELL[0] - CELL[1]) // 2))
        picture = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        if font.getlength(text) > CELL[0] + 8 or (key := picture.tobytes()) in seen:
            continue  # the font has no picture of its own for it
        seen.add(key)
        name = facts["en"].strip(":").replace("_", " ").lower()
        entries.append({"emoji": text, "name": name, "keywords": known.get(_bare(text), [])})
        pictures.append(picture.transpose(2, 0, 1))
    save_file(
        {"pictures": torch.from_numpy(np.stack(pictures).copy())}, work / "pictures.safetensors"
    )
    (work / "names.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1))
    print(f"{len(entries)} pictures")


def _is_left_out(text: str) -> bool:
    """Skin tones, which multiply the pictures, and the flags of countries and regions."""
    return any(
        0x1F3FB <= ord(c) <= 0x1F3FF or 0x1F1E6 <= ord(c) <= 0x1F1FF or ord(c) == 0xE007F
        for c in text
    )


def _bare(text: str) -> str:
    return text.replace("\ufe0f", "")


def _keywords() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for node in ET.parse(ANNOTATIONS / folder / "en.xml").iter("annotation"):
            if node.get("type") is None:
                words = [word.strip().lower() for word in (node.text or "").split("|")]
                found[_bare(node.get("cp", ""))] = words
    return found


def make_tokenizer(work: Path) -> None:
    """A CLIP tokenizer whose merges are learned from the names and keywords."""
    entries = json.loads((work / "names.json").read_text())
    texts = [text for each in entries for text in (each["name"], *each["keywords"])]
    learned = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    learned.train_from_iterator(texts, trainer)
    merges = [
        pair if isinstance(pair, str) else " ".join(pair)
        for pair in json.loads(learned.to_str())["model"]["merges"]
    ]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in merges)]
    folder = work / "bpe"
    folder.mkdir(exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )
    tokenizer.save_pretrained(work / "tokenizer")
    lengths = [len(tokenizer(each["name"]).input_ids) for each in entries]
    print(
        f"{len(vocabulary)} tokens; names take {max(lengths)} at most, {np.mean(lengths):.1f} each"
    )


class Training:
    """A loop that keeps its state, goes on where it was interrupted, and shows the loss.

    Args:
        path: of the state.
        modules: what is trained, but for what is frozen, by name; an average of the weights is
            kept.
        decay: of that average.
        warmup: the steps in which the rate rises.
    """

    def __init__(
        self,
        path: Path,
        modules: dict[str, nn.Module],
        *,
        steps: int,
        rate: float,
        decay: float,
        warmup: int = 200,
    ) -> None:
        self.path, self.modules, self.steps, self.decay = path, modules, steps, decay
        self.parameters = [
            p for module in modules.values() for p in module.parameters() if p.requires_grad
        ]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min(1.0, i / warmup) * 0.5 * (1 + math.cos(math.pi * min(i / steps, 1.0))),
        )
        self.step = 0
        if path.exists():
            self._load(torch.load(path, weights_only=True))

    def run(self, loss_of: Callable[[torch.Generator], Tensor]) -> None:
        """Minimize ``loss_of``, which draws from the generator that it is given."""
        saved, shown = time.monotonic(), None
        for step in track(range(self.step, self.steps), self.path.stem, self.steps):
            # Seeded by the step, so that an interruption changes nothing.
            loss = loss_of(torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            decay = min(self.decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [*self.parameters], 1 - decay)
            shown = loss.item() if shown is None else 0.99 * shown + 0.01 * loss.item()
            self.step = step + 1
            if step % 200 == 0:
                print(f"{self.path.stem} {step}: loss {shown:.4f}", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def averaged(self) -> dict[str, nn.Module]:
        """The modules with the averaged weights, in evaluation mode."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)
        return {name: module.eval() for name, module in self.modules.items()}

    def save(self) -> None:
        """Write the state."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }
        temporary = self.path.with_suffix(".new")
        torch.save(state, temporary)
        temporary.rename(self.path)

    def _load(self, state: dict[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def pictures_of(work: Path) -> tuple[Tensor, list[dict[str, Any]]]:
    """The pictures, float32 [N, 3, 64, 64] in [-1, 1], and their entries."""
    pictures = load_file(work / "pictures.safetensors")["pictures"].to(DEVICE)
    return pictures.float() / 127.5 - 1, json.loads((work / "names.json").read_text())


def can_flip(entries: list[dict[str, Any]]) -> Tensor:
    """Whether a mirrored picture has the same name, bool [N]."""
    return torch.tensor([not any(word in each["name"] for word in DIRECTED) for each in entries])


def augmented(pictures: Tensor, flips: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each picture by up to ``MAX_SHIFT`` pixels over white, and mirror some."""
    mirrored = flips & (torch.rand(len(pictures), generator=generator) < 0.5)
    padded = F.pad(pictures, [MAX_SHIFT] * 4, value=1.0)
    shifts = torch.randint(2 * MAX_SHIFT + 1, (len(pictures), 2), generator=generator).tolist()
    return torch.stack(
        [
            each[:, y : y + SIDE, x : x + SIDE].flip(-1)
            if flip
            else each[:, y : y + SIDE, x : x + SIDE]
            for each, (y, x), flip in zip(padded, shifts, mirrored.tolist(), strict=True)
        ]
    )


def variants_of(pictures: Tensor, flips: Tensor) -> Iterator[Tensor]:
    """The pictures, then ``VARIANTS`` shifted and mirrored copies of them, the same every time."""
    generator = torch.Generator().manual_seed(1)
    yield pictures
    for _ in range(VARIANTS):
        yield augmented(pictures, flips, generator)


def train_vae(work: Path, steps: int, batch: int) -> None:
    """L1 and MSE of the pixels, L1 of their differences (edges), and a little KL."""
    pictures, entries = pictures_of(work)
    flips = can_flip(entries)
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**VAE)
    vae.to(DEVICE).to(memory_format=torch.channels_last)
    training = Training(work / "vae.pt", {"vae": vae}, steps=steps, rate=1.5e-3, decay=0.998)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        images = augmented(pictures[rows], flips[rows], generator)
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(DEVICE)
        drawn = vae.decode(posterior.mean + posterior.std * noise).sample
        error = drawn - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss: Tensor = (
            error.abs().mean() + error.square().mean() + edges + 1e-5 * posterior.kl().mean()
        )
        return loss

    training.run(loss_of)
    averaged: Any = training.averaged()["vae"]
    averaged = averaged.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        means = torch.cat([averaged.encode(x).latent_dist.mean for x in pictures.split(64)])
        error = torch.cat([averaged.decode(x).sample for x in means.split(64)]) - pictures
    averaged.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    averaged.save_pretrained(work / "vae")
    print(f"VAE: MSE {error.square().mean():.5f}, scaling factor {averaged.config.scaling_factor}")


@torch.no_grad()
def encode_latents(work: Path) -> None:
    """The latents of the pictures and of shifted and mirrored copies, float32
    [1 + VARIANTS, N, C, 8, 8], scaled.
    """
    pictures, entries = pictures_of(work)
    vae: Any = AutoencoderKL.from_pretrained(work / "vae")
    vae.to(DEVICE).eval()
    variants = variants_of(pictures, can_flip(entries))
    latents = torch.stack(
        [
            torch.cat([vae.encode(x).latent_dist.mean for x in copy.split(64)])
            for copy in track(variants, "latents", 1 + VARIANTS)
        ]
    )
    save_file(
        {"latents": (latents * vae.config.scaling_factor).contiguous()},
        work / "latents.safetensors",
    )


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT,
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 [N, TOKENS]."""
    ids = tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    assert isinstance(ids, Tensor)
    return ids.to(DEVICE)


def prompts_for(
    entries: list[dict[str, Any]], rows: list[int], generator: torch.Generator
) -> Iterator[str]:
    """What each picture is asked for by: its name, some of its keywords, or nothing."""
    for row, (kind, few) in zip(
        rows, torch.rand(len(rows), 2, generator=generator).tolist(), strict=True
    ):
        entry = entries[row]
        words = entry["keywords"]
        if kind < PROMPT_DROPOUT:
            yield ""
        elif kind < PROMPT_DROPOUT + KEYWORDS_SHARE and words:
            order = torch.randperm(len(words), generator=generator).tolist()
            yield ", ".join(words[i] for i in order[: 2 + int(3 * few)])
        else:
            yield entry["name"]


def take_parts(work: Path, start: Path, parts: Sequence[str] = PARTS) -> None:
    """Keep these parts of a made model as they are."""
    for part in parts:
        if not (work / part).exists():
            shutil.copytree(start / part, work / part)


def check_vae(work: Path, model: Path) -> None:
    """Raise BadParameter where the VAE in ``work``, whose latents are learned from, is not the
    model's, which may be the same in half precision.
    """
    ours, theirs = (
        {name: x.half() for name, x in load_file(folder / "vae" / WEIGHTS).items()}
        for folder in (work, model)
    )
    if ours.keys() != theirs.keys() or any(not ours[name].equal(x) for name, x in theirs.items()):
        raise typer.BadParameter(
            f"{work}: expected the VAE of {model}, whose network takes no other's latents; give "
            "another --work"
        )


def drawn_latents(
    latents: Tensor, batch: int, generator: torch.Generator
) -> tuple[Tensor, list[int]]:
    """Latents [B, C, 8, 8] of pictures, most of them as they are, some shifted or mirrored; and
    which pictures they are. ``latents`` as of :func:`encode_latents`.
    """
    rows = torch.randint(latents.shape[1], (batch,), generator=generator)
    variants = torch.randint(1, len(latents), (batch,), generator=generator)
    plain = torch.rand(batch, generator=generator) < PLAIN_SHARE
    return latents[variants.masked_fill(plain, 0), rows], rows.tolist()


def timestep_shares(scheduler: Any) -> Tensor:
    """How often each timestep is trained, float32 [T]: after Hang et al. 2023 (min-SNR), whose
    weights of the loss are frequencies here.
    """
    signal = scheduler.alphas_cumprod
    ratio = signal / (1 - signal)
    shares: Tensor = LEAST_SHARE + ratio.clamp(max=MOST_SNR) / ratio
    return shares


def train_unet(work: Path, steps: int, batch: int, start: Path | None) -> None:
    """Epsilon-MSE, text encoder and UNet together, with prompt dropout for guidance."""
    latents = load_file(work / "latents.safetensors")["latents"].to(DEVICE)
    _, entries = pictures_of(work)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoder: Any = CLIPTextModel(_text_config(tokenizer))
    unet: Any = UNet2DConditionModel(**UNET)
    if start is not None:
        encoder = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
    encoder.to(DEVICE).train()
    unet.to(DEVICE).train()
    modules = {"unet": unet, "text_encoder": encoder}
    training = Training(work / "unet.pt", modules, steps=steps, rate=1.5e-3, decay=0.9995)
    scheduler: Any = DDIMScheduler(**SCHEDULER)
    shares = timestep_shares(scheduler)

    def loss_of(generator: torch.Generator) -> Tensor:
        clean, rows = drawn_latents(latents, batch, generator)
        noise = torch.randn(clean.shape, generator=generator).to(DEVICE)
        timesteps = torch.multinomial(shares, batch, True, generator=generator).to(DEVICE)
        texts = list(prompts_for(entries, rows, generator))
        states = encoder(token_ids(tokenizer, texts)).last_hidden_state
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states=states).sample
        return F.mse_loss(predicted, noise)

    training.run(loss_of)
    for name, module in training.averaged().items():
        saved: Any = module
        saved.save_pretrained(work / name)


def train_judge(work: Path, steps: int, batch: int) -> None:
    """A CLIP of its own, image and text encoder, trained on the real pictures to tell which name is
    whose. Nothing of it enters the model's training, calibration or finetuning.
    """
    pictures, entries = pictures_of(work)
    flips = can_flip(entries)
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    ids = token_ids(tokenizer, [each["name"] for each in entries])
    config = CLIPConfig(
        text_config=_text_config(tokenizer).to_dict(),
        vision_config={**VISION, "image_size": SIDE},
        projection_dim=JUDGE_WIDTH,
    )
    judge = CLIPModel(config).to(DEVICE)
    training = Training(work / "judge.pt", {"judge": judge}, steps=steps, rate=1e-3, decay=0.99)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randperm(len(pictures), generator=generator)[:batch]
        images = augmented(pictures[rows], flips[rows], generator)
        found: Any = judge(input_ids=ids[rows], pixel_values=images, return_loss=True)
        loss: Tensor = found.loss
        return loss

    training.run(loss_of)
    averaged: Any = training.averaged()["judge"]
    copies = augmented(pictures, flips, torch.Generator().manual_seed(7))
    print(f"judge: {retrieval(averaged, ids, copies):.1%} of the pictures, ", end="")
    print(f"{retrieval(averaged, ids, shrunk(copies)):.1%} where they are a sixteenth smaller")
    write_judge(averaged, ids, copies, work / "judge")


@torch.no_grad()
def write_judge(judge: Any, ids: Tensor, copies: Tensor, folder: Path) -> None:
    """The image encoder in FP16, and what it makes of the names and of real pictures."""
    config = CLIPVisionConfig(**judge.config.vision_config.to_dict())
    config.projection_dim = JUDGE_WIDTH
    encoder: Any = CLIPVisionModelWithProjection(config).eval()
    encoder.vision_model.load_state_dict(judge.vision_model.state_dict())
    encoder.visual_projection.load_state_dict(judge.visual_projection.state_dict())
    encoder.half().save_pretrained(folder)
    encoder.float()  # rounded as it will be read
    seen = torch.cat([encoder(pixel_values=x.cpu()).image_embeds for x in copies.split(256)])
    names = judge.text_projection(judge.text_model(input_ids=ids).pooler_output)
    statistics = {
        "names": F.normalize(names, dim=1).cpu().half()[prompt_order(len(names))],
        "mean": seen.double().mean(0),
        "covariance": seen.double().T.cov(),
    }
    save_file(
        {name: value.contiguous() for name, value in statistics.items()},
        folder / "statistics.safetensors",
    )


def prompt_order(count: int) -> list[int]:
    """The order of the prompts that ship: mixed, so that the first ones are of all kinds."""
    return random.Random(0).sample(range(count), count)


def shrunk(pictures: Tensor) -> Tensor:
    """The pictures a sixteenth smaller, on white: a change that nothing was trained on."""
    small = F.interpolate(pictures, size=SIDE - 4, mode="bilinear", antialias=True)
    return F.pad(small, [2] * 4, value=1.0)


@torch.no_grad()
def retrieval(judge: Any, ids: Tensor, images: Tensor) -> float:
    """The share of images [N, 3, 64, 64] of the names [N] whose own name is the nearest of all."""
    found = [judge(input_ids=ids, pixel_values=x).logits_per_image for x in images.split(256)]
    nearest = torch.cat(found).argmax(1).cpu()
    return float((nearest == torch.arange(len(ids))).float().mean())


def write_pipeline(work: Path, out: Path) -> None:
    """The pipeline, and what judges it."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline, work, out)


def save_pipeline(pipeline: Any, work: Path, out: Path) -> None:
    """Write a pipeline in FP16, in diffusers' layout, its prompts, and what judges its images."""
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    entries = json.loads((work / "names.json").read_text())
    names = [entries[i]["name"] for i in prompt_order(len(entries))]
    (out / "prompts.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    shutil.copytree(work / "judge", out / "judge", dirs_exist_ok=True)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors' own is for the owner alone
    for path in out.glob("*/config.json"):  # where each part was read from is of this machine
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.2f} MB")


def make_missing(work: Path, stages: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Make the results that are not in ``work``, in their order."""
    for result, make in stages:
        if not (work / result).exists():
            make()


def make_latents(work: Path, model: Path, parts: Sequence[str]) -> None:
    """Make the pictures and their latents where they are not in ``work``, for what is trained for
    ``model``, whose VAE they are of; ``parts`` are what is taken of it.
    """
    work.mkdir(parents=True, exist_ok=True)
    take_parts(work, model, parts)
    check_vae(work, model)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("names.json", lambda: draw_pictures(work)),
        ("latents.safetensors", lambda: encode_latents(work)),
    ]
    make_missing(work, stages)


def main(
    out: Annotated[Path, typer.Option()] = Path("quest_deploy/models/emoji"),
    work: Annotated[Path, typer.Option(help="What is kept between stages.")] = Path("build/emoji"),
    vae_steps: int = 3500,
    vae_batch: int = 24,
    unet_steps: int = 18500,
    unet_batch: int = 64,
    judge_steps: int = 1200,
    judge_batch: int = 192,
    start: Annotated[Path | None, typer.Option(help="A model to train further.")] = None,
) -> None:
    """Make the model."""
    work.mkdir(parents=True, exist_ok=True)
    if start is not None:
        take_parts(work, start)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("names.json", lambda: draw_pictures(work)),
        ("tokenizer", lambda: make_tokenizer(work)),
        ("vae", lambda: train_vae(work, vae_steps, vae_batch)),
        ("latents.safetensors", lambda: encode_latents(work)),
        ("unet", lambda: train_unet(work, unet_steps, unet_batch, start)),
        ("judge", lambda: train_judge(work, judge_steps, judge_batch)),
    ]
    make_missing(work, stages)
    write_pipeline(work, out)


if __name__ == "__main__":
    typer.run(main)
