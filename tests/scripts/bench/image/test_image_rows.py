"""Every row, measured on a small Stable Diffusion with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from quest_deploy.backends.openvino.backend import compile_graph
from quest_deploy.backends.openvino.precision import runtime_info
from quest_deploy.backends.options import EngineOptions
from scripts.bench.image import prepare
from scripts.bench.image.__main__ import PEERS, kind_of_machine
from scripts.bench.image.limits import limit_of, product
from scripts.bench.image.prepare import (
    BF16,
    HYBRID,
    SIZES,
    OurForm,
    Prepared,
    pixels,
    shapes_of,
)
from scripts.bench.image.quality import quality_of
from scripts.bench.image.rows import has_bf16, measure, rows_of
from scripts.bench.image.runner import Environments, MissingError

if TYPE_CHECKING:
    from pathlib import Path

SMALL = SIZES["small"]
ONE_OF_EACH = (
    "ours-w8a8-attention8",
    "ours-w8a8-attention8-bf16",
    "openvino-fp32",
    "nncf-int8",
    "optimum-intel-hybrid",
    "openvino-genai-int8",
    "torch-compiled",
)
INT8_ERROR = 0.5
LIMITS = {"torch-compiled": 1e-4, "openvino-fp32": 1e-4}
"""What a row's predictions may be off by; the others' are quantized."""
NEEDS_BF16 = pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """What the programs read, of the small size."""
    return Prepared(tmp_path_factory.mktemp("bench-image"), SMALL, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name)
        for row in rows_of(kind_of_machine())
        if row.name in ONE_OF_EACH
    ],
)
def test_a_row_of_each_program_that_is_installed_has_all_figures(
    row: Any, prepared: Prepared
) -> None:
    try:
        found = measure(row, prepared, Environments(PEERS))
    except MissingError as e:
        pytest.skip(str(e))
    assert found["error"] < LIMITS.get(row.name, INT8_ERROR)
    assert found["error"] > 0 or row.worker == "plain_torch"
    assert 0 < found["open_s"] < found["first_image_s"]
    parts = [found[name] for name in ("text_encoder_s", "unet_s", "vae_s")]
    assert min(parts) > 0
    assert sum(parts) <= 1.01 * found["image_s"]
    assert found["unet_step_s"] * SMALL.steps == pytest.approx(found["unet_s"])
    assert found["peak_bytes"] > found["bytes"] > 0
    assert found["versions"]


@pytest.mark.slow
def test_a_step_s_limit_is_the_layers_own_time_and_attention_s_at_the_peak(
    prepared: Prepared,
) -> None:
    found = limit_of(prepared.workspace(OurForm("w8a8", attention8=True)))
    assert min(found.values()) > 0
    assert found["limit_s"] == found["layers_s"] + found["attention_at_peak_s"]


@pytest.mark.parametrize("integer", [False, True])
def test_the_peak_s_product_is_one_kernel_of_its_type(tmp_path: Path, *, integer: bool) -> None:
    onnx.save(product(64, integer=integer), tmp_path / "product.onnx")
    compiled = compile_graph(tmp_path / "product.onnx", EngineOptions(threads=1))
    kernels = {
        node.input(1).get_element_type().get_type_name()
        for node in compiled.get_runtime_model().get_ordered_ops()
        if runtime_info(node, "layerType").startswith("FullyConnected")
    }
    assert kernels == ({"i8"} if integer else {"f32"})


@pytest.mark.slow
def test_an_interrupted_workspace_goes_on_with_what_is_missing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "ours"
    arguments = (folder, prepared.pipeline(), prepared.recorded(), OurForm("w8a8"), 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare.qd, "build_parts", killed)
        prepare.build_ours(*arguments)
    made = [folder / "calibrated.safetensors", folder / "engines" / "openvino" / "engine.json"]
    before = [path.stat().st_mtime_ns for path in made]
    prepare.build_ours(*arguments)
    assert [path.stat().st_mtime_ns for path in made] == before
    assert (folder / "parts" / "vae_decoder" / "openvino" / "engine.json").exists()


@pytest.mark.slow
def test_predictions_are_compared_on_the_inputs_of_a_guided_image(prepared: Prepared) -> None:
    folder = prepared.inputs()
    found = {path.stem: np.load(path) for path in folder.iterdir()}
    _, (sample, _, states), _ = shapes_of(SMALL).values()
    assert list(found["sample"].shape[1:]) == list(found["prediction"].shape[1:]) == sample
    assert list(found["encoder_hidden_states"].shape[1:]) == states
    unconditional, conditional = np.moveaxis(found["encoder_hidden_states"], 1, 0)
    assert not np.allclose(unconditional, conditional)
    assert (np.diff(found["timestep"][:, 0]) < 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["w8a8", HYBRID, pytest.param(BF16, marks=NEEDS_BF16)])
def test_images_of_the_embedded_model_come_near_fp32_s_at_8_bits(
    form: str, prepared: Prepared
) -> None:
    found = quality_of(prepared.folder, form, threads=1, images=2)
    assert found["psnr"] > 15
    assert 0.5 < found["ssim"] < 1


def test_full_size_is_stable_diffusion_1_5_s() -> None:
    full = SIZES["full"]
    assert pixels(full) == 512
    assert full.steps == 20
    assert shapes_of(full)["unet"] == [[2, 4, 64, 64], [1], [2, 77, 768]]


def test_an_environment_of_another_folder_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        Environments(tmp_path).python("sdcpp")
