"""The adapters of the embedded model: what they are trained on, and how."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from quest_deploy.models.registry import EMBEDDED_FOLDER
from scripts import make_emoji_adapters as script
from scripts.make_emoji_model import encode_latents, take_parts

if TYPE_CHECKING:
    from pathlib import Path


def squares(*tops: int) -> torch.Tensor:
    """Pictures of a red square on white, its upper edge in that row."""
    pictures = torch.ones(len(tops), 3, 64, 64)
    for picture, top in zip(pictures, tops, strict=True):
        picture[1:, top : top + 20, 20:40] = -1
    return pictures


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


@pytest.mark.slow
def test_training_writes_what_diffusers_reads_and_goes_on_where_it_was(tmp_path: Path) -> None:
    names = ["red apple", "blue car", "left arrow", "cat"]
    entries = [{"emoji": "", "name": name, "keywords": []} for name in names]
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "names.json").write_text(json.dumps(entries))
    pictures = ((squares(5, 10, 20, 30) + 1) * 127.5).byte()
    save_file({"pictures": pictures}, work / "pictures.safetensors")
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
