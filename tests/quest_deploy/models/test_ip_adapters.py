"""IP-Adapters in the float model, against diffusers' own."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from quest_deploy.artifacts.checkpoint import Architecture
from quest_deploy.artifacts.image_folder import ImageFolder
from quest_deploy.artifacts.model_source import IPAdapter, ModelSource
from quest_deploy.models.attention import add_image_attentions
from quest_deploy.models.image_inputs import made_image
from quest_deploy.models.ip_adapters import ImagePrompts, load_image_parts, load_projection
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.residuals import IMAGE_PROMPT, IMAGE_SCALE, IMAGE_TOKENS
from quest_deploy.quantization.model import build_float_model
from tests.helpers import refused
from tests.pipelines import IMAGE_TOKENS as COUNT
from tests.pipelines import PLUS_TOKENS, ip_adapter

SHOWN = [made_image(i, 24, 20).image for i in (1, 2)]


def model_with(pipeline: Path, adapter: Path, scale: str = ":0.7") -> PipelineModel:
    return load_model(resolve_source(str(pipeline), ip_adapter=f"{adapter}{scale}"))


def folder_of(folder: Path, images: Sequence[Image.Image]) -> ImageFolder:
    folder.mkdir()
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return ImageFolder.of(folder)


def inputs_of(model: PipelineModel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *model.sample_shape, generator=generator)
    return {
        "sample": sample,
        "timestep": torch.tensor([900.0, 10.0]),
        **model.draw_conditions(2, generator),
    }


@pytest.mark.parametrize("plus", [False, True], ids=["plain", "plus"])
@pytest.mark.parametrize("name", ["controlled", "controlled-xl"])
@torch.no_grad()
def test_with_an_images_tokens_the_float_model_is_diffusers_own(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str, plus: bool
) -> None:
    path = ip_adapter(tmp_path / "models", pipelines(name), plus=plus)
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(pipelines(name))
    theirs.load_ip_adapter(str(tmp_path), subfolder="models", weight_name=path.name)
    theirs.set_ip_adapter_scale(0.7)
    model = model_with(pipelines(name), path)
    prompts = ImagePrompts(model, folder_of(tmp_path / "shown", SHOWN))
    asked, null = prompts.asked(torch.zeros(2).numpy()), prompts.null(2)
    assert asked[IMAGE_TOKENS].shape == (2, PLUS_TOKENS if plus else COUNT, _width(model))
    assert torch.equal(asked[IMAGE_SCALE], torch.full((2,), 0.7))

    cpu = torch.device("cpu")
    for i, image in enumerate(SHOWN):
        (embeds,) = theirs.prepare_ip_adapter_image_embeds(image, None, cpu, 1, True)
        none, found = theirs.unet.encoder_hid_proj([embeds])[0][:, 0]
        torch.testing.assert_close(asked[IMAGE_TOKENS][i], found)
        torch.testing.assert_close(null[IMAGE_TOKENS][i], none)

    inputs, unet = inputs_of(model), model.load_unet()
    (embeds,) = theirs.prepare_ip_adapter_image_embeds([SHOWN], None, cpu, 1, False)
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs}
    expected = theirs.unet(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        added_cond_kwargs={**added, "image_embeds": [embeds.transpose(0, 1)]},
    ).sample
    found = unet(**inputs, **asked).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    without = unet(**inputs).sample
    assert (found - without).abs().max() > 1e-2

    off = {**asked, IMAGE_SCALE: torch.tensor([0.0, 0.7])}
    half = unet(**inputs, **off).sample
    assert torch.equal(half[0], without[0])
    torch.testing.assert_close(half[1], found[1])
    assert torch.equal(unet(**inputs, **prompts.nothing(2)).sample, without)
    for name, missing in (IMAGE_PROMPT, reversed(IMAGE_PROMPT)):
        with refused(missing):
            unet(**inputs, **{name: asked[name]})


def _width(model: PipelineModel) -> int:
    return int(model.config["cross_attention_dim"])


def test_a_source_without_one_is_recorded_as_before() -> None:
    assert "ip_adapter" not in ModelSource("emoji").to_json()


def test_files_and_folders_are_known_again(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = ip_adapter(tmp_path / "models", pipelines("controlled"))
    source = resolve_source(str(pipelines("controlled")), ip_adapter=str(path))
    assert source.ip_adapter is not None
    assert source.ip_adapter.scale == 1.0
    assert source.ip_adapter.image_encoder == str(tmp_path / "models" / "image_encoder")
    source.check_unchanged()
    config = tmp_path / "models" / "image_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    with refused("image encoder", "image_encoder"):
        source.check_unchanged()
    path.write_bytes(path.read_bytes() + b" ")
    with refused(path):
        load_model(source)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8)}, ["FaceID"]),
        ({"ip_adapter.0.to_k_lora.down.weight": (8, 8)}, ["FaceID", "LoRA"]),
        ({"image_proj.proj.weight": None, "image_proj.proj.0.weight": (8, 8)}, ["proj.0.weight"]),
        ({"clip.weight": (8, 8)}, ["clip.weight"]),
        ({"image_proj.norm.weight": (9,)}, ["9", "16"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_adapter_for_the_model_is_refused_when_the_model_is_loaded(
    pipelines: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], facts: list[str]
) -> None:
    path = _changed(ip_adapter(tmp_path, pipelines("controlled")), change)
    with refused(path, *facts):
        model_with(pipelines("controlled"), path)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"ip_adapter.1.to_k_ip.weight": None}, ["1.to_k_ip.weight", "missing"]),
        ({"ip_adapter.1.to_k_ip.weight": (8, 16)}, ["1.to_k_ip.weight", "[8, 16]"]),
        ({"ip_adapter.9.to_v_ip.weight": (8, 16)}, ["9.to_v_ip.weight"]),
    ],
    ids=["missing", "shape", "superfluous"],
)
def test_layers_of_another_unet_are_refused_by_name(
    pipelines: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], facts: list[str]
) -> None:
    path = _changed(ip_adapter(tmp_path, pipelines("controlled")), change)
    with refused(path, *facts):
        model_with(pipelines("controlled"), path).load_unet()


def _changed(path: Path, change: dict[str, tuple[int, ...] | None]) -> Path:
    tensors = load_file(path)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    save_file(tensors, path)
    return path


def test_paths_that_cannot_be_are_refused(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    path = ip_adapter(tmp_path, pipelines("controlled"))
    for text, fact in (
        (f"{path}:0", "scale"),
        (f"{path}:nan", "scale"),
        (f"{path}:10.5", "scale"),
        (str(tmp_path / "none.safetensors"), "none.safetensors"),
        (str(tmp_path / "image_encoder"), "safetensors"),
    ):
        with refused("--ip-adapter", fact):
            IPAdapter.parse(text)
    with refused("--image-encoder", tmp_path / "none"):
        IPAdapter.parse(str(path), tmp_path / "none")
    with refused("--image-encoder", "--ip-adapter"):
        resolve_source(str(pipelines("controlled")), image_encoder=tmp_path)


def test_an_image_encoder_of_another_width_or_none_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = ip_adapter(tmp_path / "a", pipelines("controlled"))
    encoder = tmp_path / "a" / "image_encoder"
    other = ip_adapter(tmp_path / "b", pipelines("controlled"))
    weight = torch.zeros(COUNT * 16, 20)
    _changed(other, {"image_proj.proj.weight": tuple(weight.shape)})
    with refused(tmp_path / "b" / "image_encoder", "projection_dim", "20", "--image-encoder"):
        load_image_parts(model_with(pipelines("controlled"), other))
    encoder.rename(tmp_path / "elsewhere")
    with refused(path, "--image-encoder"):
        load_image_parts(model_with(pipelines("controlled"), path))
    source = resolve_source(
        str(pipelines("controlled")), ip_adapter=str(path), image_encoder=tmp_path / "elsewhere"
    )
    assert load_image_parts(load_model(source)).keys() == {"image_encoder", "feature_extractor"}


def test_images_are_read_as_packages_read_them_at_the_size_of_the_encoder(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pipelines("controlled"), tmp_path / "model")
    path = ip_adapter(tmp_path / "a", folder)
    for size, deviation, crop in ((24, 0.3, 16), (16, 0.3, 16)):
        shutil.rmtree(folder / "feature_extractor", ignore_errors=True)
        own = CLIPImageProcessorPil(size=size, crop_size=size, image_std=[deviation] * 3)
        own.save_pretrained(folder / "feature_extractor")
        found = load_image_parts(model_with(folder, path))["feature_extractor"]
        assert type(found) is CLIPImageProcessorPil  # Pillow's
        assert (found.crop_size["height"], found.crop_size["width"]) == (crop, crop)
        assert (found.image_std == own.image_std) == (size == crop)
    assert ImagePrompts(model_with(folder, path)).crop == (16, 16)


@pytest.mark.parametrize("name", ["ldm", "pix2pix", "class-tokens"])
def test_models_of_other_kinds_take_none(
    pipelines: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = ip_adapter(tmp_path, pipelines("controlled"))
    with refused("--ip-adapter", "text-to-image"):
        model_with(pipelines(name), path)


def test_an_architecture_says_it(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    path = ip_adapter(tmp_path, pipelines("controlled"))
    model = model_with(pipelines("controlled"), path)
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    built = build_float_model(
        Architecture("UNet2DConditionModel", config, {}, None, ip_adapter=True)
    )
    assert built.state_dict().keys() == model.load_unet().state_dict().keys()
    projection = load_projection(model.source.ip_adapter)  # type: ignore[arg-type]
    assert not any(x.requires_grad for x in projection.parameters())
    unet = load_model(resolve_source(str(pipelines("ldm")))).load_unet()
    with refused("cross-attention"):
        add_image_attentions(unet)


def test_images_are_shown_in_turn(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_with(pipelines("controlled"), ip_adapter(tmp_path / "a", pipelines("controlled")))
    images = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
    prompts = ImagePrompts(model, folder_of(tmp_path / "images", images))
    tokens = prompts.asked(torch.zeros(3).numpy())[IMAGE_TOKENS]
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert prompts.asked(torch.zeros(3).numpy()).keys() == set(IMAGE_PROMPT)


@pytest.mark.parametrize("given", [True, False], ids=["given", "drawn"])
def test_images_are_encoded_one_by_one_no_more_than_are_shown_and_the_encoder_is_let_go(
    pipelines: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: bool,
) -> None:
    model = model_with(
        pipelines("controlled"), ip_adapter(tmp_path / "a", pipelines("controlled"), plus=True)
    )
    folder = folder_of(tmp_path / "images", SHOWN)
    (tmp_path / "images" / "9.png").write_text("which is not read")
    sizes, forward = [], CLIPVisionModelWithProjection.forward
    encoders: weakref.WeakSet[Any] = weakref.WeakSet()

    def counted(self: Any, pixel_values: Any, **options: Any) -> Any:
        encoders.add(self)
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(CLIPVisionModelWithProjection, "forward", counted)
    prompts = ImagePrompts(model, ImageFolder.of(folder.path) if given else None, samples=2)
    tokens = prompts.asked(torch.zeros(3, *model.sample_shape).numpy())[IMAGE_TOKENS]
    assert len(tokens) == 3
    assert sizes == [1] * (3 if given else 4)  # and one that is none
    gc.collect()
    assert not encoders
