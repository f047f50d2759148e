"""Where models come from: names, the hub's cache, folders, single files, random weights; and what
changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from quest_deploy.artifacts.model_source import INDEX, Lora, ModelSource
from quest_deploy.artifacts.schema import parse
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.files import sha256_of, write_json
from quest_deploy.importers.architecture import UNetConfig
from quest_deploy.models import loading, pipeline_model, registry
from quest_deploy.models.hub import fetch_pipeline
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.registry import ARCHITECTURES, KNOWN_MODELS
from quest_deploy.quantization.model import QuantizedModel
from tests.helpers import refused
from tests.pipelines import text_to_image

MILLIONS = {
    "sd14": 860,
    "sd15": 860,
    "sd21": 866,
    "sdxl": 2567,
    "ldm-bedroom": 274,
    "ldm-church": 295,
    "ldm-imagenet": 401,
}
"""Parameters of each UNet as its authors give them."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def cached(hub: Path, pipelines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a small pipeline in the cache, as sd15 at the registry's commit and as its
    branch "main".
    """
    monkeypatch.setitem(KNOWN_MODELS, "sd15", registry.KnownModel("owner/name", COMMIT))
    repository = hub / "models--owner--name"
    shutil.copytree(pipelines("sd"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_an_architecture_of_the_package_has_its_authors_number_of_parameters(
    name: str, millions: int
) -> None:
    import diffusers

    config = json.loads((ARCHITECTURES / name / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = getattr(diffusers, config["_class_name"]).from_config(config)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", MILLIONS)
def test_every_architecture_is_known_by_its_conditions_and_schedule_without_a_hub(
    hub: Path, name: str
) -> None:
    model = load_model(resolve_source(name, random_weights=True))
    side = {"sdxl": 128, "sd21": 96, "ldm-church": 32}.get(name, 64)
    assert model.sample_shape[1:] == (side, side)
    family = {
        "ldm-bedroom": "unconditional",
        "ldm-church": "unconditional",
        "ldm-imagenet": "class-conditional",
    }
    assert model.family == family.get(name, "text-to-image")
    conditions = model.draw_conditions(2, torch.Generator().manual_seed(0))
    width = {"sd14": 768, "sd15": 768, "sd21": 1024, "sdxl": 2048, "ldm-imagenet": 512}.get(name)
    assert {
        key: value.shape[-1] for key, value in conditions.items() if key == "encoder_hidden_states"
    } == ({} if width is None else {"encoder_hidden_states": width})
    assert model.load_scheduler("ddim").config.prediction_type == (
        "v_prediction" if name == "sd21" else "epsilon"
    )


def test_sdxl_is_given_the_pooled_text_and_the_pictures_size(hub: Path) -> None:
    conditions = load_model(resolve_source("sdxl", random_weights=True)).null_conditions(2)
    assert conditions["text_embeds"].shape == (2, 1280)
    assert conditions["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 2


def test_random_weights_are_those_of_the_seed(pipelines: Callable[[str], Path]) -> None:
    def weights(seed: int) -> torch.Tensor:
        source = ModelSource("sd", str(pipelines("sd")), random_weights=True, seed=seed)
        return load_model(source).load_unet().get_parameter("conv_in.weight")

    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_heads_that_a_configuration_cannot_say_reach_the_checkpoints_architecture(
    pipelines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pipelines("ldm"), tmp_path / "ldm")
    monkeypatch.setattr(pipeline_model, "ARCHITECTURES", tmp_path)
    monkeypatch.setitem(KNOWN_MODELS, "ldm", registry.KnownModel(heads=4))
    model = load_model(ModelSource("ldm", random_weights=True))
    unet, scheme = model.load_unet(), Scheme.parse("w8a8", buckets=1)
    recorded = record_trajectories(model, unet, steps=1, samples=2, seed=0)
    checkpoint = calibrate("ldm", unet, recorded, scheme, CalibrationOptions())
    attention: Any = QuantizedModel.from_checkpoint(checkpoint).model.get_submodule(
        "down_blocks.0.attentions.0"
    )
    assert (checkpoint.architecture.heads, attention.heads) == (4, 4)


def test_a_model_comes_from_the_cache_at_the_pinned_commit_and_its_source_says_so(
    cached: Path,
) -> None:
    source = resolve_source("sd15")
    assert source == ModelSource("sd15", "owner/name", COMMIT)
    model = load_model(source)
    assert model.load_unet().get_parameter("conv_in.weight").shape == (16, 4, 3, 3)
    assert model.images(torch.zeros(1, 4, 8, 8).numpy()).shape == (1, 3, 16, 16)


def test_a_branch_is_recorded_with_the_commit_that_it_stands_for(cached: Path) -> None:
    source = resolve_source("sd15", revision="main")
    assert (source.revision, source.requested) == (COMMIT, "main")
    assert load_model(source).load_unet() is not None


def test_a_copy_in_the_cache_that_lacks_a_file_is_not_used(cached: Path) -> None:
    shutil.rmtree(cached / "unet")
    with refused("incomplete"):
        fetch_pipeline("owner/name", COMMIT)


@pytest.mark.parametrize(
    "content", [{"_class_name": "StableDiffusionPipeline", "unet": []}, ["unet"], {"unet": 3}]
)
def test_a_damaged_index_in_the_cache_is_refused_by_name(cached: Path, content: Any) -> None:
    write_json(cached / INDEX, content)
    with refused(cached / INDEX):
        resolve_source("sd15")


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_the_other_ways(hub: Path) -> None:
    with refused("stable-diffusion-v1-5/stable-diffusion-v1-5", "--model PATH", "--random-weights"):
        resolve_source("sd15")


@pytest.mark.parametrize("name", ["ldm-bedroom", "ldm-church", "ldm-imagenet"])
def test_a_model_without_a_repository_in_this_layout_says_so(name: str) -> None:
    with refused(name, "--model PATH", "--random-weights"):
        resolve_source(name)


def test_a_model_whose_commit_is_not_pinned_takes_one(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(
        "sana", KNOWN_MODELS["sana"].repository, "--revision", "--model PATH", "--random-weights"
    ):
        resolve_source("sana")
    asked: list[Any] = []
    monkeypatch.setattr(
        loading, "fetch_pipeline", lambda *given: asked.append(given) or hub / COMMIT
    )
    source = resolve_source("sana", revision=COMMIT)
    assert asked == [(KNOWN_MODELS["sana"].repository, COMMIT)]
    assert (source.location, source.revision, source.requested) == (*asked[0], COMMIT)


@pytest.mark.parametrize(
    ("model", "options", "facts"),
    [
        ("tiny", {}, "tiny --model emoji"),
        ("emoji", {"revision": "main"}, "--revision"),
        (
            "sd15",
            {"revision": "main", "random_weights": True},
            "--revision",
        ),
        ("sd15", {"loras": ["style.bin:1"]}, "--lora .safetensors style.bin"),
        ("sd15", {"loras": ["style.safetensors"]}, "--lora style.safetensors"),
        ("sd15", {"loras": ["style.safetensors:nan"]}, "PATH:WEIGHT style.safetensors:nan"),
        (
            "sd15",
            {"loras": ["style.safetensors:much"]},
            "PATH:WEIGHT style.safetensors:much",
        ),
    ],
)
def test_options_that_do_not_apply_are_refused(
    model: str, options: dict[str, Any], facts: str
) -> None:
    with refused(*facts.split()):
        resolve_source(model, **options)


def test_a_folder_without_an_index_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "weights.bin"):
        with refused(path, "diffusers"):
            resolve_source(str(path))


def test_a_folder_whose_weights_were_changed_is_refused_and_a_copy_elsewhere_is_known_again(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(pipelines("sd"), tmp_path / "model")
    source = resolve_source(str(tmp_path / "model"))
    assert (source.name, source.location) == ("model", str(tmp_path / "model"))
    assert source.fingerprint == resolve_source(str(pipelines("sd"))).fingerprint
    load_model(source)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-40:] = bytes(40)
    weights.write_bytes(content)
    with refused(tmp_path / "model", "-w"):
        load_model(source)
    shutil.rmtree(tmp_path / "model")
    with refused(tmp_path / "model", "-w"):
        load_model(source)


def linked_part(model: Path, store: Path) -> Path:
    """Move a model's UNet elsewhere and leave a link; the file of its weights."""
    shutil.move(model / "unet", store)
    (model / "unet").symlink_to(store, target_is_directory=True)
    return store / "diffusion_pytorch_model.safetensors"


def linked_files(model: Path, store: Path) -> Path:
    """Make every file of a model a link to a blob, as the hub's cache and DVC do."""
    store.mkdir()
    for i, path in enumerate(sorted(p for p in model.rglob("*") if p.is_file())):
        shutil.move(path, store / str(i))
        path.symlink_to(store / str(i))
    return (model / "unet" / "diffusion_pytorch_model.safetensors").resolve()


def linked_whole(model: Path, store: Path) -> Path:
    """Make the model's folder itself a link."""
    shutil.move(model, store)
    model.symlink_to(store, target_is_directory=True)
    return store / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("link", [linked_part, linked_files, linked_whole])
def test_weights_behind_links_are_read_and_a_change_of_them_is_noticed(
    pipelines: Callable[[str], Path], tmp_path: Path, link: Callable[[Path, Path], Path]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pipelines("sd"), model)
    weights = link(model, tmp_path / "store")
    source = resolve_source(str(model))
    assert (source.name, source.location) == ("model", str(model))
    assert source.fingerprint == resolve_source(str(pipelines("sd"))).fingerprint
    expected = load_model(resolve_source(str(pipelines("sd")))).load_unet().state_dict()
    found = load_model(source).load_unet().state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    content = bytearray(weights.read_bytes())
    content[-40:] = bytes(40)
    weights.write_bytes(content)
    with refused(model, "-w"):
        load_model(source)


def test_a_link_to_other_weights_is_noticed(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model, first = tmp_path / "model", tmp_path / "first"
    shutil.copytree(pipelines("sd"), model)
    linked_part(model, first)
    source = resolve_source(str(model))
    (model / "unet").unlink()
    (model / "unet").symlink_to(pipelines("sd-v") / "unet", target_is_directory=True)
    with refused(model, "-w"):
        load_model(source)


def test_links_in_a_circle_end_and_folders_that_are_one_are_told_from_two(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pipelines("sd"), model)
    (model / "again").symlink_to(model, target_is_directory=True)
    (model / "other").symlink_to(model / "unet", target_is_directory=True)
    (model / "nowhere").symlink_to(tmp_path / "missing")
    source = resolve_source(str(model))
    load_model(source)
    (model / "other").unlink()
    (model / "other").symlink_to(model / "vae", target_is_directory=True)
    with refused(model, "-w"):
        load_model(source)


def test_a_single_file_and_a_lora_that_are_links_keep_their_own_names(tmp_path: Path) -> None:
    save_file({"weight": np.ones(1)}, tmp_path / "blob")
    for name in ("model.safetensors", "style.safetensors"):
        (tmp_path / name).symlink_to("blob")
    source = resolve_source(
        str(tmp_path / "model.safetensors"), loras=[str(tmp_path / "style.safetensors")]
    )
    assert (source.name, source.location) == ("model", str(tmp_path / "model.safetensors"))
    assert source.loras[0].path == str(tmp_path / "style.safetensors")


@pytest.mark.parametrize(
    ("name", "suffix", "weight"),
    [
        ("style:v2.safetensors", "", 1.0),
        ("style:v2.safetensors", ":0.8", 0.8),
        ("style:0.5.safetensors", ":-1e-1", -0.1),
        ("12:30/стиль и 模型.safetensors", ":2", 2.0),
        ("style.safetensors", ":0", 0.0),
    ],
)
def test_a_loras_path_may_hold_colons(
    tmp_path: Path, name: str, suffix: str, weight: float
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_file({"weight": np.ones(1)}, path)
    lora = Lora.parse(f"{path}{suffix}")
    assert (lora.path, lora.weight) == (str(path), weight)


def test_a_lora_that_was_changed_is_refused(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"weight": np.ones(1)}, path)
    source = ModelSource("sd", str(pipelines("sd")), loras=(Lora.parse(f"{path}:0.5"),))
    assert source.loras[0].weight == 0.5
    save_file({"weight": np.zeros(1)}, path)
    with refused(path, "-w"):
        load_model(source)


@pytest.mark.parametrize("size", [0, 60, 2**40], ids=["empty", "cut off", "a sparse terabyte"])
def test_a_lora_of_another_size_than_its_header_says_is_refused_before_it_is_hashed(
    pipelines: Callable[[str], Path], tmp_path: Path, size: int
) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"weight": np.ones(1)}, path)
    recorded = Lora.parse(str(path))
    os.truncate(path, size)
    for read in (lambda: resolve_source(str(pipelines("sd")), loras=[str(path)]), recorded.check):
        with refused(path, size):
            read()


def test_settings_beside_a_lora_are_bounded_before_they_are_hashed(tmp_path: Path) -> None:
    path, settings = tmp_path / "style.safetensors", tmp_path / "adapter_config.json"
    save_file({"weight": np.ones(1)}, path)
    settings.write_text("{}")
    known = Lora.parse(str(path)).sha256
    assert known == hashlib.sha256(f"{sha256_of(path)} {sha256_of(settings)}".encode()).hexdigest()
    os.truncate(settings, 2**40)
    with refused(settings):
        Lora.parse(str(path))


def test_a_source_survives_json() -> None:
    source = ModelSource(
        "sd15", "owner/name", COMMIT, "main", loras=(Lora("/a.safetensors", 0.5, "ab" * 32),)
    )
    assert parse(ModelSource, source.to_json(), "source") == source


def single_file(folder: Path, path: Path) -> Path:
    """The UNet of a pipeline under the names that Stability's checkpoints have, as far as a UNet of
    one level needs them.
    """
    from safetensors.torch import load_file, save_file

    config = UNetConfig(
        8, 4, 32, 4, 1, (1,), (1,), num_heads=2, use_spatial_transformer=True, context_dim=16
    )
    names = config.names()
    renamed = {layer.targets[0]: layer.name for layer in names.layers} | {
        target: name for name, (target, _) in names.floats.items()
    }
    state = {}
    for key, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        module, _, parameter = key.rpartition(".")
        state[f"model.diffusion_model.{renamed[module]}.{parameter}"] = value
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 7}, path)
    return path


@pytest.fixture
def small_sd15(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small pipeline, whose architecture single files are taken to have."""
    levels = {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (32,),
    }
    folder = text_to_image(tmp_path / "architectures" / "sd15", **levels)
    monkeypatch.setattr("quest_deploy.models.pipeline_model.ARCHITECTURES", folder.parent)
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_gives_the_unet_of_the_folder_it_was_made_from(
    small_sd15: Path, tmp_path: Path, suffix: str
) -> None:
    path = single_file(small_sd15, tmp_path / f"model{suffix}")
    source = resolve_source(str(path))
    assert source.name == "model"
    found, expected = (
        load_model(each).load_unet().state_dict()
        for each in (source, resolve_source(str(small_sd15)))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("damage", ["missing", "NaN"])
def test_a_damaged_weight_of_a_single_file_is_refused_by_name(
    small_sd15: Path, tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    path = single_file(small_sd15, tmp_path / "model.safetensors")
    tensors = load_file(path)
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key][0, 0, 0, 0] = float("nan")
    save_file(tensors, path)
    with refused(path, "down_blocks.0.resnets.0.conv1.weight"):
        load_model(resolve_source(str(path))).load_unet()


def test_a_single_file_without_a_tokenizer_in_reach_says_where_it_would_come_from(
    hub: Path, tmp_path: Path, pipelines: Callable[[str], Path]
) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(pipelines("sd") / "unet" / "diffusion_pytorch_model.safetensors", path)
    with refused(path, "tokenizer", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        load_model(resolve_source(str(path))).null_conditions(1)


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_a_pickle_that_is_more_than_tensors_is_refused_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "model.ckpt").open("wb") as stream:
        pickle.dump({"state_dict": Payload()}, stream)
    with refused("model.ckpt", "weights_only"):
        load_model(resolve_source("model.ckpt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_truncated_single_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"PK\x03\x04 and nothing else")
    with refused(path):
        load_model(resolve_source(str(path)))
