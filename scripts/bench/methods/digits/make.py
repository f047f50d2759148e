"""Make the embedded model again from nothing: the digit UNet, its class embedding, its classifier.

    python -m scripts.bench.methods.digits.make [--steps 4441] [--out FOLDER]

About 18 minutes on one core. Needs scikit-learn (the `dev` extra) for the digits and the
classifier. The FP32 model is trained without any knowledge of quantization.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.progress import track
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from scripts.bench.methods.digits import model as tiny
from scripts.bench.methods.digits.quality import features_of

TRAIN_IMAGES = 1500
BATCH = 64
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 200
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.9995


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits, shuffled: images float32 [N, 1, 16, 16] in [-1, 1], labels int64 [N]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=tiny.IMAGE_SIZE, mode="bilinear") / 8 - 1
    order = torch.tensor(np.random.default_rng(0).permutation(len(images)))
    return images[order], torch.tensor(data.target)[order]


def make_classifier(images: torch.Tensor, labels: torch.Tensor, out: Path) -> float:
    """Train the metric's classifier, write it with the real images' feature statistics, return its
    held-out accuracy.
    """
    flat, target = images.flatten(1).numpy(), labels.numpy()
    model = MLPClassifier((128, 32), random_state=1, max_iter=30).fit(
        flat[:TRAIN_IMAGES], target[:TRAIN_IMAGES]
    )
    weights = {f"weight.{i}": w.astype(np.float32) for i, w in enumerate(model.coefs_)}
    weights |= {f"bias.{i}": b.astype(np.float32) for i, b in enumerate(model.intercepts_)}
    features = features_of(images.numpy(), weights)
    weights["real_mean"], weights["real_cov"] = features.mean(0), np.cov(features, rowvar=False)
    save_file({k: torch.tensor(v) for k, v in weights.items()}, out / "classifier.safetensors")
    return float(model.score(flat[TRAIN_IMAGES:], target[TRAIN_IMAGES:]))


def train(images: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[Any, torch.nn.Embedding]:
    """Epsilon-MSE training with label dropout; returns the exponential moving average of the
    weights.
    """
    unet: Any = UNet2DConditionModel(**tiny.UNET_CONFIG)
    embedding = torch.nn.Embedding(
        tiny.NULL_CLASS + 1, tiny.TOKENS * tiny.UNET_CONFIG["cross_attention_dim"]
    )
    parameters = [*unet.parameters(), *embedding.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, i / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(i / steps, 1))),
    )
    scheduler: Any = DDIMScheduler(**tiny.SCHEDULER_CONFIG)
    latents = tiny.latents_from_images(images)
    for step in track(range(steps), "training"):
        rows = torch.randint(len(latents), (BATCH,))
        classes = torch.where(torch.rand(BATCH) < LABEL_DROPOUT, tiny.NULL_CLASS, labels[rows])
        noise, timestep = (
            torch.randn(BATCH, 4, 8, 8),
            torch.randint(scheduler.config.num_train_timesteps, (BATCH,)),
        )
        noisy = scheduler.add_noise(latents[rows], noise, timestep)
        tokens = embedding(classes).unflatten(1, (tiny.TOKENS, -1))
        loss = F.mse_loss(unet(noisy, timestep, tokens).sample, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    return unet, embedding


@torch.no_grad()
def held_out_loss(
    unet: torch.nn.Module,
    embedding: torch.nn.Embedding,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> float:
    """Mean epsilon-MSE on held-out images, 16 draws of noise and timestep each."""
    scheduler: Any = DDIMScheduler(**tiny.SCHEDULER_CONFIG)
    latents, total = tiny.latents_from_images(images), 0.0
    for _ in range(16):
        noise, timestep = torch.randn_like(latents), torch.randint(1000, (len(latents),))
        tokens = embedding(labels).unflatten(1, (tiny.TOKENS, -1))
        total += (
            F.mse_loss(
                unet(scheduler.add_noise(latents, noise, timestep), timestep, tokens).sample, noise
            ).item()
            / 16
        )
    return total


def main(
    steps: Annotated[int, typer.Option(min=1)] = 4441, seed: int = 0, out: Path = tiny.ASSETS
) -> None:
    """Train and write the embedded model."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    print(f"classifier: held-out accuracy {make_classifier(images, labels, out):.4f}")
    unet, embedding = train(images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES], steps)
    print(
        "held-out loss "
        f"{held_out_loss(unet.eval(), embedding, images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]):.4f}"
    )
    unet.half().save_pretrained(out / "unet", safe_serialization=True)
    save_file({"weight": embedding.weight.detach().half()}, out / "class_embedding.safetensors")
    scheduler: Any = DDIMScheduler(**tiny.SCHEDULER_CONFIG)
    scheduler.save_pretrained(out / "scheduler")
    report = {"steps": steps, "seed": seed, "torch": torch.__version__.split("+")[0]}
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
