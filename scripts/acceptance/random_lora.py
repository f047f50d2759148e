"""Write a LoRA of random weights for a workspace's model, which changes what its attention computes
enough that an engine without it fails its verification.

    python -m scripts.acceptance.random_lora WORKSPACE FILE
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quest_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint
from quest_deploy.artifacts.workspace import Workspace

RANK, SIZE = 4, 0.5
"""The change's deviation is ``SIZE`` times the weight's."""


def random_lora(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    """The factors of every linear layer of attention, float32, by diffusers' names."""
    generator = np.random.default_rng(0)
    factors: dict[str, NDArray[Any]] = {}
    for name, layer in checkpoint.layers.items():
        weight = layer.dequantized_weight
        if ".attn" not in name or weight.ndim != 2:
            continue
        outputs, inputs = weight.shape
        down = generator.standard_normal((RANK, inputs))
        up = generator.standard_normal((outputs, RANK)) * SIZE * weight.std() / RANK**0.5
        factors[f"unet.{name}.lora_A.weight"] = down.astype(np.float32)
        factors[f"unet.{name}.lora_B.weight"] = up.astype(np.float32)
    return factors


def main(workspace: Path, target: Path) -> None:
    """Write the LoRA of the checkpoint that is to be deployed."""
    save_file(random_lora(load_checkpoint(Workspace.open(workspace).checkpoint_path)), target)


if __name__ == "__main__":
    typer.run(main)
