"""The weights of each part of a model: every form that works is loaded, every damage is named."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quest_deploy.artifacts.checkpoint import save_checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.trajectories import record_trajectories
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.pipeline_model import PipelineModel
from quest_deploy.models.weights import check_memory
from tests.helpers import refused
from tests.quest_deploy.support import cli

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]

PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
CHANGED = {
    "unet": "down_blocks.1.resnets.0.conv1.weight",
    "text_encoder": "encoder.layers.1.mlp.fc1.weight",
    "text_encoder_2": "text_model.encoder.layers.1.mlp.fc1.weight",
    "vae": "decoder.conv_in.weight",
}
"""A weight of each part, by its name in the module."""
FEW = ("--samples", "1", "--steps", "2", "--buckets", "2", "--method", "minmax")


@pytest.fixture
def model(pipelines: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small SDXL, which has every part."""
    return shutil.copytree(pipelines("sdxl"), tmp_path / "model")


def use(folder: Path, part: str) -> dict[str, Any]:
    """Load a part where it is used; what it holds or gives."""
    model = load_model(resolve_source(str(folder)))
    assert isinstance(model, PipelineModel)
    if part == "unet":
        return model.load_unet().state_dict()
    if part == "vae":
        return {"images": torch.from_numpy(model.images(np.ones((1, 4, 8, 8), np.float32)))}
    return model.conditions(np.asarray([0]))


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def key_of(tensors: dict[str, Tensor], part: str) -> str:
    """The name in the file of the part's weight: transformers' classes may differ in a prefix."""
    return next(key for key in tensors if key.endswith(CHANGED[part].removeprefix("text_model.")))


def change(folder: Path, part: str, edit: Callable[[dict[str, Tensor], str], Any]) -> None:
    path = weights_of(folder, part)
    tensors = load_file(path)
    edit(tensors, key_of(tensors, part))
    save_file(tensors, path, metadata={"format": "pt"})


def remove(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


def reshape(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.ones(3, 5)


def spoil(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key].view(-1)[3] = float("nan")


def overflow(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key].view(-1)[3] = float("inf")
    tensors[key] = tensors[key].half()


def prefix(name: str) -> Callable[[dict[str, Tensor], str], None]:
    def edit(tensors: dict[str, Tensor], key: str) -> None:
        for old in list(tensors):
            tensors[f"{name}{old}"] = tensors.pop(old)

    return edit


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], str], Any], list[Any]]] = {
    "missing": (remove, []),
    "another shape": (reshape, [[3, 5]]),
    "NaN": (spoil, ["finite"]),
    "infinity": (overflow, ["finite"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_weight_is_refused_by_part_and_name_where_it_is_used(
    model: Path, part: str, damage: str
) -> None:
    edit, facts = DAMAGES[damage]
    change(model, part, edit)
    with refused(model / part, CHANGED[part], *facts):
        use(model, part)


@pytest.mark.parametrize("name", ["module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("part", PARTS)
def test_a_prefix_of_all_names_is_named(model: Path, part: str, name: str) -> None:
    change(model, part, prefix(name))
    with refused(model / part, f"'{name}'"):
        use(model, part)


def test_weights_that_the_unet_has_no_place_for_are_refused_by_name(model: Path) -> None:
    change(model, "unet", lambda tensors, _: tensors.update({"extra.weight": torch.ones(2)}))
    with refused(model / "unet", "extra.weight"):
        use(model, "unet")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_weights_that_another_part_has_no_place_for_are_told(
    model: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    expected = use(model, part)
    change(model, part, lambda tensors, _: tensors.update({"extra.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING, logger="quest_deploy"):
        found = use(model, part)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [part in text for text in caplog.messages if "extra.weight" in text] == [True]


@pytest.mark.parametrize(
    ("part", "edit", "facts"),
    [
        ("unet", remove, [CHANGED["unet"]]),
        ("unet", spoil, [CHANGED["unet"], "finite"]),
        ("unet", prefix("module."), ["'module.'"]),
        ("text_encoder", remove, [CHANGED["text_encoder"]]),
        ("vae", spoil, [CHANGED["vae"], "finite"]),
    ],
)
def test_the_first_command_says_so_and_leaves_nothing(
    model: Path, tmp_path: Path, part: str, edit: Any, facts: list[Any]
) -> None:
    change(model, part, edit)
    cli("calibrate", "-w", tmp_path / "ws", "--model", model, *FEW).assert_refused(
        model / part, *facts
    )
    assert not (tmp_path / "ws").exists()


def as_variant(folder: Path, part: str, variant: str) -> None:
    path = weights_of(folder, part)
    path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def shard(folder: Path, part: str, variant: str = "", *, old: bool = False) -> list[Path]:
    """Split a part's weights in two files with an index, as diffusers and transformers save large
    ones; ``old`` as diffusers once named a variant's.
    """
    path = weights_of(folder, part)
    tensors = load_file(path)
    path.unlink()
    dotted = f".{variant}" if variant else ""
    numbers = [f"-0000{i}-of-00002" for i in (1, 2)]
    named = [f"{number}{dotted}" if old else f"{dotted}{number}" for number in numbers]
    files = [path.with_name(f"{path.stem}{name}.safetensors") for name in named]
    places = {key: files[i % 2] for i, key in enumerate(tensors)}
    for file in files:
        mine = {key: tensors[key] for key in tensors if places[key] == file}
        save_file(mine, file, metadata={"format": "pt"})
    index = path.with_name(f"{path.name}.index{dotted}.json")
    total = sum(x.numel() * x.element_size() for x in tensors.values())
    names = {key: file.name for key, file in places.items()}
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    return files


FORMS: dict[str, Callable[[Path, str], Any]] = {
    "only fp16's variant": lambda folder, part: as_variant(folder, part, "fp16"),
    "only a variant of another name": lambda folder, part: as_variant(folder, part, "non_ema"),
    "shards": shard,
    "shards of a variant": lambda folder, part: shard(folder, part, "fp16"),
    "shards of a variant by their older names": lambda folder, part: shard(
        folder, part, "fp16", old=True
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_part_is_loaded_in_every_form(
    pipelines: Callable[[str], Path], model: Path, form: str
) -> None:
    for part in PARTS:
        FORMS[form](model, part)
    for part in PARTS:
        expected, found = use(pipelines("sdxl"), part), use(model, part)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_plain_weights_go_before_a_variant(
    pipelines: Callable[[str], Path], model: Path
) -> None:
    path = weights_of(model, "unet")
    spoiled = {key: torch.zeros_like(value) for key, value in load_file(path).items()}
    save_file(spoiled, path.with_name(f"{path.stem}.fp16.safetensors"))
    expected, found = use(pipelines("sdxl"), "unet"), use(model, "unet")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("part", PARTS)
def test_weights_in_half_precision_are_computed_with_in_float(model: Path, part: str) -> None:
    change(
        model, part, lambda tensors, _: tensors.update({k: x.half() for k, x in tensors.items()})
    )
    for value in use(model, part).values():
        assert value.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.uint8, "U8")])
@pytest.mark.parametrize("part", PARTS)
def test_codes_are_not_taken_for_weights(
    model: Path, part: str, dtype: torch.dtype, name: str
) -> None:
    def encode(tensors: dict[str, Tensor], key: str) -> None:
        tensors[key] = (tensors[key] * 50).to(dtype)

    change(model, part, encode)
    with refused(weights_of(model, part), name):
        use(model, part)


def test_positions_that_older_text_encoders_hold_are_no_codes(model: Path) -> None:
    ids = {"embeddings.position_ids": torch.arange(8)[None]}
    change(model, "text_encoder", lambda tensors, _: tensors.update(ids))
    use(model, "text_encoder")


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_shard_is_named(model: Path, part: str) -> None:
    _, second = shard(model, part)
    second.unlink()
    with refused(model / part, second.name):
        use(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_two_variants_and_no_plain_weights_are_ambiguous(model: Path, part: str) -> None:
    path = weights_of(model, part)
    shutil.copy(path, path.with_name(f"{path.stem}.bf16.safetensors"))
    path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    with refused(model / part, "fp16", "bf16"):
        use(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_no_safetensors_are_refused_with_the_way_to_convert_them(
    model: Path, part: str
) -> None:
    path = weights_of(model, part)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with refused(model / part, f"{path.stem}.bin", ".safetensors", "save_pretrained"):
        use(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_weights_and_one_with_a_broken_link_are_refused(
    model: Path, tmp_path: Path, part: str
) -> None:
    path = weights_of(model, part)
    path.unlink()
    with refused(model / part, ".safetensors"):
        use(model, part)
    path.symlink_to(tmp_path / "gone")
    with refused(model / part, ".safetensors"):
        use(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_a_truncated_file_is_refused(model: Path, part: str) -> None:
    path = weights_of(model, part)
    path.write_bytes(path.read_bytes()[:-100])
    with refused(path):
        use(model, part)


def test_more_weights_than_this_machine_has_memory_for_are_refused() -> None:
    check_memory(10**6, "model")
    with refused("model", "GB"):
        check_memory(10**13, "model")


def test_a_model_is_loaded_again_however_much_of_it_is_in_memory(
    pipelines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process holds counts as free: it may be what is to be loaded again."""
    import psutil

    class Full:
        available = 0

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    model = load_model(resolve_source(str(pipelines("sd"))))
    assert model.load_unet().state_dict().keys() == model.load_unet().state_dict().keys()


@pytest.fixture
def in_bfloat16(pipelines: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small Stable Diffusion 3 whose transformer was published in bfloat16."""
    folder = shutil.copytree(pipelines("sd3"), tmp_path / "sd3")
    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("random_weights", [False, True])
def test_linear_weights_stay_in_bfloat16_where_they_are_only_read_and_calibrate_to_the_same_bytes(
    in_bfloat16: Path, random_weights: bool, tmp_path: Path
) -> None:
    if random_weights:
        path = in_bfloat16 / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "torch_dtype": "bfloat16"}))
    model = load_model(resolve_source(str(in_bfloat16), random_weights=random_weights))
    narrow, wide = model.load_unet(narrow=True), model.load_unet()
    scheme = Scheme.parse("w4a4", edges=(500.0,), float_layers=model.float_layers)
    files = []
    for network in (narrow, wide):
        recorded = record_trajectories(
            model, network, steps=2, samples=1, seed=0, guidance=1.0, scheme=scheme
        )
        options = CalibrationOptions(RangeMethod.MINMAX)
        path = tmp_path / f"{len(files)}.safetensors"
        save_checkpoint(calibrate("sd3", network, recorded, scheme, options), path)
        files.append((path.read_bytes(), recorded.output))
    assert files[0][0] == files[1][0]
    assert torch.equal(files[0][1], files[1][1])
    linear = {f"{k}.weight" for k, x in wide.named_modules() if isinstance(x, torch.nn.Linear)}
    for network, held in ((narrow, linear), (wide, set())):
        state = network.state_dict()
        assert {name for name, x in state.items() if x.dtype is torch.bfloat16} == held
        assert {x.dtype for name, x in state.items() if name not in held} == {torch.float32}


def test_weights_of_which_some_are_in_float32_are_loaded_so(
    in_bfloat16: Path,
) -> None:
    path = next((in_bfloat16 / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].float()}, path, metadata={"format": "pt"})
    network = load_model(resolve_source(str(in_bfloat16))).load_unet(narrow=True)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
