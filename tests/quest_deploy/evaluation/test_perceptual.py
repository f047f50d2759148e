"""LPIPS, CLIP score and FID from weights on the disk, each against the library called directly."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from quest_deploy.evaluation.perceptual import Perceptual, Weights
from quest_deploy.stages.options import EvaluateOptions
from quest_deploy.stages.stage import as_recorded
from tests.helpers import refused
from tests.pipelines import tokenizer
from tests.quest_deploy.support import cli

CAPTIONS = ["a red cat", "a blue house", "a photo of a dog"]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (3, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small CLIP with random weights, as the hub has it."""
    folder = tmp_path_factory.mktemp("clip")
    words = tokenizer(folder / "made-from")
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**shape, **ends, "vocab_size": len(words), "max_position_embeddings": 8},
            vision_config={**shape, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_the_clip_score_is_torchmetrics(clip_folder: Path, images: NDArray[np.float32]) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    words = tokenizer(clip_folder / "again")
    prepare = CLIPImageProcessorPil.from_pretrained(clip_folder)

    class Adapter:
        """The model as torchmetrics 1.9 calls it, whose features are tensors."""

        config = SimpleNamespace()

        def to(self, device: Any) -> Adapter:
            return self

        def get_image_features(self, pixels: Any) -> Any:
            return model.get_image_features(pixels).pooler_output

        def get_text_features(self, tokens: Any, mask: Any) -> Any:
            return model.get_text_features(tokens, attention_mask=mask).pooler_output

    def process(**given: Any) -> Any:
        if "text" in given:
            return words(given["text"], return_tensors="pt", padding=True)
        return prepare([x.numpy() for x in given["images"]], return_tensors="pt")

    pixels = [torch.from_numpy(np.round((x + 1) * 127.5).astype(np.uint8)) for x in images]
    metrics = Perceptual(Weights(clip=clip_folder), SIZE, of_text=True)
    scores = []
    for captions in (CAPTIONS, CAPTIONS[::-1], [*CAPTIONS[1:], CAPTIONS[0]]):
        with torch.no_grad():
            expected = clip_score(pixels, captions, lambda: (Adapter(), process))
        scores.append(float(expected))
        found = metrics(images, captions, images)
        assert found == {"clip_score": pytest.approx(scores[-1], abs=1e-3)}
    assert max(scores) > 0


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of an AlexNet with random weights, as torchvision names them."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    state = models.alexnet(weights=None).state_dict()
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save({name: x for name, x in state.items() if name.startswith("features.")}, path)
    return path


def test_lpips_is_torchmetrics_with_that_backbone(
    alexnet_file: Path, images: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips

    models = pytest.importorskip("torchvision.models")
    metrics = Perceptual(Weights(lpips=alexnet_file), SIZE, of_text=False)
    others = images[::-1].copy()
    found = metrics(others, CAPTIONS, images)

    def features(net: str, pretrained: bool) -> Any:
        torch.manual_seed(0)
        return models.alexnet(weights=None).features

    monkeypatch.setattr(lpips, "_get_tv_model_features", features)
    expected = lpips.learned_perceptual_image_patch_similarity(
        torch.from_numpy(others), torch.from_numpy(images)
    )
    assert found == {"lpips": pytest.approx(float(expected), rel=1e-4)}
    assert found["lpips"] > 0
    assert metrics(images, CAPTIONS, images) == {"lpips": 0}
    grey = images[:, :1]
    assert metrics(grey, CAPTIONS, grey) == {"lpips": 0}


def test_images_too_small_for_lpips_are_refused_before_any_is_drawn(alexnet_file: Path) -> None:
    with refused("--lpips", "8x80"):
        Perceptual(Weights(lpips=alexnet_file), (8, 80), of_text=False)


def test_weights_that_are_not_finite_or_packed_are_refused(
    alexnet_file: Path, tmp_path: Path
) -> None:
    state = torch.load(alexnet_file, weights_only=True)
    state["features.0.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with refused("--lpips", "0.bias"):
        Perceptual(Weights(lpips=tmp_path / "nan.pth"), SIZE, of_text=False)
    packed = zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(alexnet_file) as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with refused("--lpips", "compression"):
        Perceptual(Weights(lpips=tmp_path / "packed.pth"), SIZE, of_text=False)


def test_a_folder_that_is_no_whole_clip_is_refused_before_any_image_is_drawn(
    clip_folder: Path, tmp_path: Path
) -> None:
    def spoil(path: Path) -> None:
        content = json.loads(path.read_text())
        content["size"] = content["crop_size"] = {"height": 40, "width": 40}  # the model sees 32
        path.write_text(json.dumps(content))

    for name, change in (
        ("preprocessor_config.json", Path.unlink),
        ("preprocessor_config.json", spoil),
        ("config.json", lambda path: path.write_text("{")),
    ):
        folder = tmp_path / f"{name}-{change.__name__}"
        shutil.copytree(clip_folder, folder)
        change(folder / name)
        with refused("--clip", folder):
            Perceptual(Weights(clip=folder), SIZE, of_text=True)


def test_a_prompt_longer_than_clip_takes_is_cut(
    clip_folder: Path, images: NDArray[np.float32]
) -> None:
    metrics = Perceptual(Weights(clip=clip_folder), SIZE, of_text=True)
    assert metrics(images[:1], ["a red cat " * 50], images[:1])["clip_score"] >= 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images."""
    folder = tmp_path_factory.mktemp("real")
    for i, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_fid_is_torchmetrics_with_those_weights(
    real: Path, images: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    fid = pytest.importorskip("torchmetrics.image.fid")
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    found = Perceptual(Weights(fid=real, inception=path), SIZE, of_text=False)(
        images, CAPTIONS, images
    )
    metric = fid.FrechetInceptionDistance(feature_extractor_weights_path=str(path))
    reals = np.stack([np.array(Image.open(x)) for x in sorted(real.iterdir())])
    with torch.no_grad():
        metric.update(torch.from_numpy(reals).permute(0, 3, 1, 2), real=True)
        drawn = np.round((images + 1) * 127.5).astype(np.uint8)
        metric.update(torch.from_numpy(drawn), real=False)
    assert found == {"fid": pytest.approx(float(metric.compute()), rel=1e-3)}


def test_weights_that_are_not_there_or_not_weights_are_refused(real: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"run": print}, tmp_path / "code.pth")  # what unpickling would call
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with refused("--clip", tmp_path):
        Perceptual(Weights(clip=tmp_path), SIZE, of_text=True)
    with refused("--clip"):
        Perceptual(Weights(clip=tmp_path), SIZE, of_text=False)
    for given, missing in (("fid", "inception"), ("inception", "fid")):
        with refused(f"--{missing} is missing"):
            Weights(**{given: real})
    pytest.importorskip("torchvision")
    for name in ("text.pth", "code.pth", "list.pth", "other.pth", "missing.pth"):
        with pytest.raises(Exception, match="--lpips") as caught:
            Perceptual(Weights(lpips=tmp_path / name), SIZE, of_text=False)
        assert caught.value.args


def test_a_metric_without_its_package_names_the_extra(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    with refused("torchvision", "--lpips"):
        Perceptual(Weights(lpips=tmp_path / "x.pth"), SIZE, of_text=False)
    with refused("torch_fidelity", "--fid"):
        Perceptual(Weights(fid=real, inception=tmp_path / "x.pth"), SIZE, of_text=False)


def test_a_path_of_the_wrong_kind_is_refused_before_a_package_is_missed(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file, empty = tmp_path / "x.pth", tmp_path / "empty"
    torch.save({"weight": torch.zeros(1)}, file)
    empty.mkdir()
    wrong: list[tuple[str, dict[str, Path], str]] = [
        ("--clip", {"clip": file}, "folder"),
        ("--clip", {"clip": empty}, "folder"),
        ("--lpips", {"lpips": real}, "found a folder"),
        ("--fid", {"fid": file, "inception": file}, "found a file"),
        ("--fid", {"fid": empty, "inception": file}, "found 0"),
        ("--inception", {"fid": real, "inception": real}, "found a folder"),
    ]
    for flag, given, fact in wrong:
        with refused(flag, fact):
            Perceptual(Weights(**given), SIZE, of_text=True)


@pytest.mark.parametrize("name", ["clip", "lpips", "fid", "inception"])
def test_another_file_at_the_same_place_is_another_evaluation(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "weights"
    file.write_text("one")
    place = folder if name in ("clip", "fid") else file
    first = EvaluateOptions(**{name: place})
    recorded = as_recorded(first)
    assert recorded[name] == {"path": str(place), "sha256": getattr(first, name).sha256}
    assert EvaluateOptions.from_json(recorded) == first
    assert as_recorded(EvaluateOptions(**{name: str(place)})) == recorded
    assert first.metric_files[name].unchanged() == place
    file.write_text("two")
    assert as_recorded(EvaluateOptions(**{name: place})) != recorded
    with refused(place):
        first.metric_files[name].unchanged()
    with refused(f"--{name}", tmp_path / "missing"):
        EvaluateOptions(**{name: tmp_path / "missing"})


def test_the_hash_of_a_file_is_its_sha_256(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("one")
    given = EvaluateOptions(lpips=tmp_path / "weights").metric_files["lpips"]
    assert given.sha256 == hashlib.sha256(b"one").hexdigest()


def test_an_evaluation_without_them_is_recorded_as_it_was_before_there_were_any() -> None:
    assert EvaluateOptions().to_json().keys() == {"scheduler", "seed"}


@pytest.mark.slow
def test_evaluate_reports_the_clip_score_of_every_contestant(
    workspace: Path, clip_folder: Path
) -> None:
    few = ("--images", "2", "--steps", "2", "--clip", clip_folder)
    ended = cli("evaluate", "-w", workspace, "--backend", "onnxruntime", *few)
    assert ended.code == 0, ended.err
    assert "CLIP score" in ended.out
    again = cli("evaluate", "-w", workspace, "--backend", "onnxruntime", *few, "--json")
    scores = {name: x["clip_score"] for name, x in again.json["results"].items()}
    assert scores.keys() == {"FP32", "PTQ", "QuEST", "onnxruntime"}
    assert all(0 <= score <= 100 for score in scores.values())
    assert cli("report", "-w", workspace).code == 0
    assert "CLIP score" in (workspace / "reports" / "report.html").read_text(encoding="utf-8")
