"""A model's folder whose configuration is damaged or hostile: refused by one message, at once and
in little memory, and no workspace stays behind.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.evaluation.memory import peak_memory, reset_peak_memory
from tests import pipelines
from tests.quest_deploy.support import cli

UNET, SCHEDULER, INDEX, VAE = (
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
    "vae/config.json",
)
REMOVED = object()
DAMAGES: dict[str, tuple[str, Any, Any]] = {
    "a list for the UNet": (UNET, None, []),
    "a text for the UNet": (UNET, None, "UNet"),
    "no in_channels": (UNET, "in_channels", REMOVED),
    "no sample_size": (UNET, "sample_size", REMOVED),
    "in_channels as text": (UNET, "in_channels", "4"),
    "in_channels of another model": (UNET, "in_channels", 9),
    "a million as sample_size": (UNET, "sample_size", 10**6),
    "sixteen million channels": (UNET, "block_out_channels", [2**24]),
    "more memory than there is": (UNET, "block_out_channels", [2**14]),
    "no channels": (UNET, "block_out_channels", []),
    "a thousand million layers a block": (UNET, "layers_per_block", 10**9),
    "a million blocks": (UNET, "down_block_types", ["DownBlock2D"] * 10**6),
    "an unknown block": (UNET, "down_block_types", ["NoBlock"]),
    "fewer blocks than channels": (UNET, "block_out_channels", [16, 16, 16]),
    "groups that do not divide the channels": (UNET, "norm_num_groups", 7),
    "a thousand million classes": (UNET, "num_class_embeds", 10**9),
    "an unknown activation": (UNET, "act_fn", "no such"),
    "heads as text": (UNET, "attention_head_dim", "two"),
    "a class that is no UNet": (UNET, "_class_name", "Transformer2DModel"),
    "another width of the text": (UNET, "cross_attention_dim", 24),
    "a list for the scheduler": (SCHEDULER, None, [1]),
    "a text as beta": (SCHEDULER, "beta_start", "small"),
    "a thousand million timesteps": (SCHEDULER, "num_train_timesteps", 10**9),
    "no timesteps": (SCHEDULER, "num_train_timesteps", 0),
    "timesteps as text": (SCHEDULER, "num_train_timesteps", "1000"),
    "an unknown schedule of betas": (SCHEDULER, "beta_schedule", "no such"),
    "an unknown prediction": (SCHEDULER, "prediction_type", "no such"),
    "a list for the scheduler's class": (SCHEDULER, "_class_name", [{}]),
    "a scaling factor of nothing": (VAE, "scaling_factor", 0),
    "an infinite scaling factor": (VAE, "scaling_factor", float("inf")),
    "a scaling factor as text": (VAE, "scaling_factor", "0.18"),
    "a shift that is no number": (VAE, "shift_factor", float("nan")),
    "a mean of other channels": (VAE, "latents_mean", [0.0] * 3),
    "a deviation that is infinite": (VAE, "latents_std", [1.0, 1.0, 1.0, float("inf")]),
    "a list for the index": (INDEX, None, [1, 2]),
    "a number for a part": (INDEX, "text_encoder", [1, 2]),
    "no class of the pipeline": (INDEX, "_class_name", REMOVED),
    "a class of diffusers that is no pipeline": (INDEX, "_class_name", "UNet2DModel"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound text-to-image model."""
    return pipelines.text_to_image(tmp_path_factory.mktemp("models") / "whole")


def apply(folder: Path, file: str, key: str | None, value: Any) -> None:
    """Change one key of a configuration file, or the whole of it."""
    path = folder / file
    content = json.loads(path.read_text())
    if key is None:
        content = value
    elif value is REMOVED:
        del content[key]
    else:
        content[key] = value
    path.write_text(json.dumps(content))


FIRST = ("a list for the UNet", "no in_channels", "a million as sample_size", "a text as beta")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        pytest.param(*damage, id=name, marks=[] if name in FIRST else pytest.mark.slow)
        for name, damage in DAMAGES.items()
    ],
)
def test_a_damaged_configuration_is_refused_at_once_and_the_mended_folder_is_taken(
    whole: Path, tmp_path: Path, file: str, key: str | None, value: Any
) -> None:
    folder, workspace = tmp_path / "model", tmp_path / "workspace"
    shutil.copytree(whole, folder)
    apply(folder, file, key, value)
    reset_peak_memory()
    before, started = peak_memory(), time.monotonic()
    ended = cli("calibrate", "-w", workspace, "--model", folder, "--samples", "1", "--steps", "1")
    assert ended.code == 2, ended.message
    assert time.monotonic() - started < 30
    assert peak_memory() - before < 2**30
    assert not workspace.exists() or not list(workspace.iterdir())
