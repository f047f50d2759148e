"""Which UNets go through, and by which setting the others are refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import quest_deploy as qd
from quest_deploy.artifacts.checkpoint import load_checkpoint
from quest_deploy.artifacts.workspace import CALIBRATED
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.models.conditions import states_width
from quest_deploy.models.loading import load_model, resolve_source
from tests.helpers import refused
from tests.pipelines import BASE, CLASSES, PIPELINES
from tests.quest_deploy.support import cli

FEW: dict[str, Any] = {"samples": 1, "steps": 2, "buckets": 2, "method": "minmax"}
UNET = "unet/config.json"
TEXT: dict[str, tuple[str, dict[str, Any], str]] = {
    "an upscaler's noise level": ("sd", {"num_class_embeds": 10}, "num_class_embeds"),
    "classes beside tokens": ("class-tokens", {"num_class_embeds": 10}, "num_class_embeds"),
    "a class embedding of another type": (
        "sd",
        {"class_embed_type": "timestep"},
        "class_embed_type",
    ),
    "guidance as a condition": ("sd", {"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
    "projected states": ("sd", {"encoder_hid_dim": 8}, "encoder_hid_dim"),
    "image conditions": ("sd", {"addition_embed_type": "image"}, "addition_embed_type"),
    "text that nothing reads": (
        "sd",
        {"down_block_types": ["DownBlock2D"]},
        "text cross-attention",
    ),
    "a null size": ("sd", {"sample_size": None}, "sample_size"),
    "no multiple of the downsampling": ("sdxl", {"sample_size": 7}, "sample_size 7 2"),
    "a side that is none": ("sdxl", {"sample_size": [8, 7]}, "sample_size 2"),
    "a refiner": (
        "sdxl",
        {"projection_class_embeddings_input_dim": 24 + 5 * 8},
        "projection_class_embeddings_input_dim 64 refiner",
    ),
    "a learned time embedding": ("ldm", {"time_embedding_type": "learned"}, "time_embedding_type"),
    "a Fourier time embedding": ("ldm", {"time_embedding_type": "fourier"}, "time_embedding_type"),
    "a list for the time embedding": ("ldm", {"time_embedding_type": []}, "time_embedding_type"),
    "a number for the middle block": (
        "sd",
        {"down_block_types": ["DownBlock2D"], "mid_block_type": 5},
        "mid_block_type",
    ),
    "another UNet": ("ldm", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
}


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize("case", TEXT)
def test_a_unet_that_is_not_supported_is_refused_by_its_setting(
    changed: Callable[..., Path], tmp_path: Path, case: str, *, random_weights: bool
) -> None:
    name, changes, facts = TEXT[case]
    folder = changed(name, UNET, **changes)
    extra = ["--random-weights"] if random_weights else []
    outcome = cli("calibrate", "-w", tmp_path / "ws", "--model", folder, *extra)
    outcome.assert_refused(*facts.split())
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("name", ["sd", "class-tokens"])
def test_the_width_of_states_may_be_said_for_each_level_but_is_one(
    changed: Callable[..., Path], pipelines: Callable[[str], Path], name: str
) -> None:
    config = json.loads((pipelines(name) / "unet" / "config.json").read_text())
    width, levels = config["cross_attention_dim"], len(config["block_out_channels"])
    folder = changed(name, UNET, cross_attention_dim=[width] * levels)
    model = load_model(resolve_source(str(folder), random_weights=True))
    states = model.conditions(np.zeros(1, np.int64))["encoder_hidden_states"]
    assert states.shape[-1] == width
    with refused("cross_attention_dim", width, 2 * width):
        states_width({"cross_attention_dim": [width, 2 * width]})


@pytest.mark.parametrize("random_weights", [False, True])
def test_sdxl_is_told_the_size_of_pictures_that_are_no_squares(
    changed: Callable[..., Path], tmp_path: Path, *, random_weights: bool
) -> None:
    folder = changed("sdxl", UNET, sample_size=[8, 12])
    workspace = qd.calibrate(
        str(folder), random_weights=random_weights, workspace=tmp_path / "ws", **FEW
    )
    recorded = Trajectories.load(workspace.path("trajectories.safetensors"))
    height, width = (64, 96) if random_weights else (16, 24)
    ids = recorded.conditions["time_ids"]
    assert ids.tolist() == [[height, width, 0, 0, height, width]] * len(ids)
    assert recorded.sample.shape[-2:] == (8, 12)


def classes(folder: Path) -> Path:
    """Class-conditional latent diffusion whose UNet2DConditionModel has labels and no attention."""
    PIPELINES["class-labels"](folder)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    config = {**BASE, **blocks, "in_channels": 3, "out_channels": 3, "num_class_embeds": CLASSES}
    torch.manual_seed(0)
    UNet2DConditionModel(**config).save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@torch.no_grad()
def test_labels_alone_mean_what_diffusers_embeds(tmp_path: Path) -> None:
    folder = classes(tmp_path / "classes")
    model = load_model(resolve_source(str(folder)))
    assert model.asked_for == "label"
    sample, timestep = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0])
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    expected = theirs(sample, timestep, None, class_labels=torch.tensor([3, 0]), return_dict=False)
    conditions = model.conditions(np.asarray([3, 0]))
    found = model.load_unet()(sample, timestep, **conditions, return_dict=False)
    assert torch.equal(found[0], expected[0])


@pytest.mark.slow
def test_labels_alone_go_through_every_command_and_draw_the_labels(tmp_path: Path) -> None:
    folder, root = classes(tmp_path / "classes"), tmp_path / "ws"
    few = ("--samples", "1", "--steps", "2", "--buckets", "2", "--method", "minmax")
    backend = ("--backend", "onnxruntime")
    for command, *options in (
        ("calibrate", "--model", folder, *few),
        ("finetune", "--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2"),
        ("export",),
        ("reference",),
        ("build-engine", *backend, "--threads", "1"),
        ("verify", *backend),
        ("generate", *backend, "--labels", "03", "--steps", "2", "--rows", "1"),
    ):
        outcome = cli(command, "-w", root, *options)
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", ["sd", "ldm"])
@pytest.mark.parametrize("centered", [False, True])
def test_the_first_convolution_has_8_bits_also_where_the_input_is_centered(
    changed: Callable[..., Path], tmp_path: Path, name: str, *, centered: bool
) -> None:
    folder = changed(name, UNET, center_input_sample=centered)
    workspace = qd.calibrate(str(folder), workspace=tmp_path / "ws", **FEW)
    layers = load_checkpoint(workspace.path(CALIBRATED)).layers
    assert {x for x, data in layers.items() if data.weight_bits == 8} == {"conv_in", "conv_out"}


def test_a_unet_that_does_not_run_is_refused_before_anything_is_recorded(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    # diffusers' skip blocks read three channels, whatever the configuration says
    blocks = {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}
    folder = changed("ldm", UNET, in_channels=4, out_channels=4, **blocks)
    few = ("--samples", "1", "--steps", "2", "--random-weights")
    outcome = cli("calibrate", "-w", tmp_path / "ws", "--model", folder, *few)
    outcome.assert_refused("ldm", "[4, 8, 8]")
    assert not (tmp_path / "ws").exists()
