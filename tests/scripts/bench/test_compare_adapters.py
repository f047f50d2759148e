"""The comparison of adapters, without its minutes of drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.evaluation.retrieval import Judge
from quest_deploy.evaluation.sampling import float_denoiser, sample_images
from quest_deploy.files import read_json, sha256_of
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.registry import EMBEDDED_FOLDER
from quest_deploy.quantization.model import QuantizedModel
from scripts.bench import compare_adapters as script
from scripts.make_emoji_adapters import blue_of, edges_of
from tests.helpers import refused
from tests.scripts.test_make_emoji_adapters import squares


def test_edges_agree_within_a_pixel_and_no_farther() -> None:
    asked = edges_of(squares(10, 30))
    assert script.agreement(asked, asked) == pytest.approx(1)
    assert script.agreement(edges_of(squares(11, 29)), asked) == pytest.approx(1)
    farther = script.agreement(edges_of(squares(15, 35)), asked)
    assert 0.2 < farther < 0.9
    assert script.agreement(torch.zeros_like(asked), asked) == 0
    assert script.agreement(torch.full_like(asked, 255), asked) < 0.5


def test_only_what_is_not_blue_is_far_from_blue() -> None:
    red = squares(10)
    assert script.distance_to_blue(torch.ones(1, 3, 8, 8)) < 1e-3
    assert script.distance_to_blue(blue_of(red)) < script.distance_to_blue(red) / 10


class Height(torch.nn.Module):
    """Residuals that say how high the edges are."""

    def forward(self, *_: Any, controlnet_cond: torch.Tensor, **__: Any) -> Any:
        rows = controlnet_cond.mean((1, 3)) @ torch.linspace(-5, 5, 64)
        return [torch.zeros(1)] * 6, rows.view(-1, 1, 1, 1)


def test_each_image_follows_its_own_edges() -> None:
    unet: Any = load_model(resolve_source("emoji")).load_unet()

    def drawn(*tops: int) -> Any:
        model = script.Sketched.load(edges_of(squares(*tops)))
        denoise = script.steered(float_denoiser(unet), Height())
        return sample_images(model, denoise, np.arange(2), steps=2, guidance=4.0)

    first, other = drawn(10, 30), drawn(10, 5)
    np.testing.assert_allclose(first[0], other[0], atol=1e-4)
    assert np.abs(first[1] - other[1]).max() > 1e-2


def test_the_quantized_model_adds_residuals_as_the_float_model_does(
    small_checkpoint: Checkpoint, small_inputs: dict[str, torch.Tensor]
) -> None:
    quantized = QuantizedModel.from_checkpoint(small_checkpoint).eval()
    shapes: list[torch.Size] = []

    class Zero(torch.nn.Module):
        def forward(self, sample: torch.Tensor, *_: Any, **__: Any) -> Any:
            shapes.append(sample.shape)
            return [torch.zeros(1)] * 4, torch.zeros(1)

    class One(Zero):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            down, middle = super().forward(*arguments, **options)
            return down, middle + 1

    with torch.no_grad():
        plain = quantized(**small_inputs)
        edges = torch.zeros(5, 3, 8, 8)
        same, other = (
            script.steered(quantized, made)(**small_inputs, edges=edges) for made in (Zero(), One())
        )
    assert torch.equal(same, plain)
    assert (other - plain).abs().max() > 1e-3
    assert shapes == [small_inputs["sample"].shape] * 2


def test_pictures_are_the_nearest_to_the_judge_to_which_they_are_real(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = squares(*range(2, 42)) * torch.rand(40, 1, 1, 1, generator=generator)
    labels = np.arange(40)
    made, shipped = (
        script.judge_of(pictures, EMBEDDED_FOLDER / "judge", tmp_path),
        Judge(EMBEDDED_FOLDER / "judge"),
    )
    images = pictures.numpy()
    found, theirs = (judge(images, labels, images) for judge in (made, shipped))
    assert found.frechet_distance < 0.05 * theirs.frechet_distance
    assert (found.top1, found.top5) == (theirs.top1, theirs.top5)


def test_a_drawing_is_kept_until_what_it_was_made_from_changes(tmp_path: Path) -> None:
    emoji, calls = load_model(resolve_source("emoji")), list[str]()

    def case(name: str) -> script.Case:
        def unet() -> Any:
            calls.append(name)
            return lambda sample, timestep, **_: torch.zeros_like(sample)

        return script.Case(name, unet, {"checkpoint": name})

    sampling = script.SamplingOptions(2, steps=2)
    bench, asked = script.Bench(tmp_path, sampling, {}), edges_of(squares(10, 30))
    first = bench.drawn(case("a"), emoji)
    np.testing.assert_array_equal(bench.drawn(case("a"), emoji), first)
    bench.drawn(case("b"), emoji)
    assert calls == ["a", "b"]
    judged = bench.judged(first, first, Judge(EMBEDDED_FOLDER / "judge"), asked)
    assert (judged["psnr"], judged["ssim"]) == (None, pytest.approx(1))


FIGURES = {
    "psnr": 20.5,
    "ssim": 0.9,
    "frechet_distance": 3.25,
    "top1": 0.25,
    "top5": 0.5,
    "distance_to_blue": 1.25,
    "agreement": 0.75,
}


def test_the_page_has_every_row_and_leaves_out_what_compares_no_noise() -> None:
    rows = {"the pictures": FIGURES, "FP32": FIGURES | {"psnr": None}, "W4A4": FIGURES}
    sampling = {"images": 8, "steps": 20, "scheduler": "ddim", "guidance": 4.0}
    table = {"sampling": sampling, "rows": rows}
    page = script.page({"lora": table, "controlnet": table})
    lines = page.splitlines()
    dash = "\N{EN DASH}"
    assert f"| the pictures | 1.25 | 3.25 | {dash} | {dash} |" in lines
    assert "| FP32 | 0.750 | 3.25 | 50.0% | same | 0.900 |" in lines
    assert "| W4A4 | 0.750 | 3.25 | 50.0% | 20.50 | 0.900 |" in lines


def test_each_table_says_what_it_was_drawn_with() -> None:
    sampling = {"images": 8, "steps": 20, "scheduler": "ddim", "guidance": 4.0}
    other = {**sampling, "images": 256}
    found = {
        name: {"sampling": x, "rows": {}} for name, x in (("lora", sampling), ("controlnet", other))
    }
    (lora, controlnet) = (x for x in script.page(found).splitlines() if "the same noise" in x)
    assert (lora.split()[0], controlnet.split()[0]) == ("8", "256")


def test_workspaces_that_would_share_a_row_or_a_folder_are_refused(tmp_path: Path) -> None:
    made = {
        place: Workspace.create(tmp_path / place, "emoji", Scheme.parse(bits))
        for place, bits in (("a/w4", "w4a4"), ("b/w4", "w8a8"), ("other", "w4a4"))
    }
    script.check_apart([made["b/w4"], made["other"]])
    with refused("W4A4"):
        script.check_apart([made["a/w4"], made["other"]])
    with refused("w4"):
        script.check_apart([made["a/w4"], made["b/w4"]])


def test_the_page_that_ships_is_that_of_the_figures_and_of_the_adapters_that_ship() -> None:
    found = read_json(script.RESULTS)
    assert (script.DOCS / script.TABLE).read_text(encoding="utf-8") == script.page(found)
    for table in found.values():
        for name, digest in table["adapter"].items():
            assert sha256_of(script.ADAPTERS / name) == digest
