"""The adapters of the embedded model: what they are trained on, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import ControlNetModel, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.registry import EMBEDDED_FOLDER
from scripts import make_emoji_adapters as script
from scripts.make_emoji_model import WEIGHTS, check_vae, encode_latents, take_parts
from tests.scripts.emoji_work import small_work, squares

SHIPPED = Path(__file__).parents[2] / "examples" / "adapters"
STYLE, EDGES = SHIPPED / script.STYLE, SHIPPED / script.EDGES


def test_a_blue_picture_has_the_lightness_of_its_own_and_one_hue() -> None:
    ends = torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2)
    torch.testing.assert_close(script.blue_of(ends), ends)
    # Pure green has the lightness 0.587.
    found = script.blue_of(torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1)).flatten()
    expected = [2 * 0.587**power - 1 for power in (1.6, 1.0, 0.6)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_edges_are_where_a_shape_ends_and_nowhere_else() -> None:
    (edges,) = script.edges_of(squares(10))
    assert set(edges.unique().tolist()) == {0, 255}
    rows, columns = np.nonzero(edges.numpy())
    assert (rows.min(), rows.max()) == (9, 30)
    assert (columns.min(), columns.max()) == (19, 40)
    assert not edges[12:28, 22:38].any()


def test_a_picture_that_fills_its_frame_has_no_edges_at_the_frame() -> None:
    assert not script.edges_of(-torch.ones(1, 3, 64, 64)).any()


def test_the_shipped_lora_is_small_and_fuses_as_diffusers_fuses_it() -> None:
    assert STYLE.stat().st_size < 200_000
    ours = load_model(resolve_source("emoji", loras=[str(STYLE)])).load_unet().state_dict()
    plain = load_model(resolve_source("emoji")).load_unet().state_dict()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        EMBEDDED_FOLDER, torch_dtype=torch.float32
    )
    pipeline.load_lora_weights(SHIPPED, weight_name=script.STYLE)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changed = [name for name in plain if not torch.equal(ours[name], plain[name])]
    assert len(changed) == 70  # ten products in each of seven blocks
    for name, theirs in pipeline.unet.state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-5)


def controlnet() -> nn.Module:
    made: nn.Module = ControlNetModel.from_pretrained(EDGES, torch_dtype=torch.float32).eval()
    return made


@torch.no_grad()
def test_the_shipped_controlnet_is_small_and_makes_the_residuals_of_edges() -> None:
    assert sum(path.stat().st_size for path in EDGES.iterdir()) < 4_000_000
    sample, states = torch.zeros(2, 8, 8, 8), torch.zeros(2, 24, 128)
    edges = script.edges_of(squares(10, 30))[:, None].expand(-1, 3, -1, -1) / 255
    down, middle = controlnet()(
        sample, torch.tensor(500), states, controlnet_cond=edges, return_dict=False
    )
    unet: Any = load_model(resolve_source("emoji")).load_unet()
    unet(
        sample,
        torch.tensor(500),
        states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    )
    assert all((each[0] - each[1]).abs().max() > 1e-3 for each in (*down, middle))


@pytest.mark.slow
def test_training_writes_what_diffusers_reads_and_goes_on_where_it_was(tmp_path: Path) -> None:
    work, out = small_work(tmp_path / "work"), tmp_path / "out"
    take_parts(work, EMBEDDED_FOLDER)
    encode_latents(work)
    options: dict[str, Any] = {"out": out, "work": work, "model": EMBEDDED_FOLDER}
    steps: dict[str, Any] = {"lora_batch": 2, "controlnet_batch": 2}
    script.main(**options, lora_steps=2, controlnet_steps=2, **steps)
    first = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert len(first) == 2
    layers = load_file(out / script.STYLE)
    assert len(layers) == 140
    assert all(name.startswith("unet.") for name in layers)
    assert any(value.any() for name, value in layers.items() if ".lora_B." in name)
    ControlNetModel.from_pretrained(out / script.EDGES)
    states = {name: (work / f"{name}.pt").read_bytes() for name in ("lora", "controlnet")}
    script.main(**options, lora_steps=2, controlnet_steps=2, **steps)
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == first
    assert {name: (work / f"{name}.pt").read_bytes() for name in states} == states
    (work / "lora" / script.STYLE).unlink()  # as an interruption before it was written leaves it
    script.main(**options, lora_steps=2, controlnet_steps=2, **steps)
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == first


def test_latents_of_another_vae_than_the_models_are_refused(tmp_path: Path) -> None:
    take_parts(tmp_path, EMBEDDED_FOLDER)
    path = tmp_path / "vae" / WEIGHTS
    weights = {name: value.float() for name, value in load_file(path).items()}
    save_file(weights, path)
    check_vae(tmp_path, EMBEDDED_FOLDER)  # the same, in float32
    save_file({name: 1.01 * value for name, value in weights.items()}, path)
    with pytest.raises(typer.BadParameter):
        check_vae(tmp_path, EMBEDDED_FOLDER)
