from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy.importers.architecture import UNetConfig
from quest_deploy.importers.convert import float_model
from tests.helpers import refused
from tests.quest_deploy.importers.cases import CHURCHES, CLASS_CONDITIONAL, SD, UNCONDITIONAL, Case
from tests.quest_deploy.importers.compare import relative
from tests.quest_deploy.importers.official import Arithmetic, UNetModel

THREE_LEVELS = {
    **UNCONDITIONAL,
    "image_size": 16,
    "num_res_blocks": 3,
    "channel_mult": [1, 2, 3],
    "attention_resolutions": [1, 4],
}
ONE_HEAD = {**UNCONDITIONAL, "num_head_channels": -1, "num_heads": 1, "num_res_blocks": 1}
SCALE_SHIFT = {**SD, "use_scale_shift_norm": True}
HEAD_CHANNELS = {**CLASS_CONDITIONAL, "num_heads": -1, "num_head_channels": 16}


@pytest.mark.parametrize(
    "params",
    [
        SD,
        CLASS_CONDITIONAL,
        UNCONDITIONAL,
        THREE_LEVELS,
        ONE_HEAD,
        HEAD_CHANNELS,
        CHURCHES,
        SCALE_SHIFT,
    ],
)
@torch.no_grad()
def test_the_diffusers_model_with_mapped_weights_is_the_compvis_model(
    params: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(params)
    ours = float_model(case.read(tmp_path / "ckpt.pth"))
    case.model.arithmetic = Arithmetic()
    for timestep, args in case.inputs.items():
        output = ours(**case.named_inputs(timestep), return_dict=False)[0]
        assert relative(output, case.model(*args)) < 1e-5


@pytest.mark.parametrize("params", [SD, CLASS_CONDITIONAL, THREE_LEVELS, CHURCHES])
def test_the_names_cover_every_parameter_with_its_shape(params: dict[str, Any]) -> None:
    names = UNetConfig.from_params(params).names()
    shapes = {f"{layer.name}.weight": layer.shape for layer in names.layers}
    shapes |= {f"{layer.name}.bias": layer.shape[:1] for layer in names.layers if layer.bias}
    shapes |= {
        f"{name}.{part}": (channels,)
        for name, (_, channels) in names.floats.items()
        for part in ("weight", "bias")
    }
    assert shapes == {
        name: tuple(value.shape) for name, value in UNetModel(**params).state_dict().items()
    }


def test_an_ldm_yaml_and_the_parameters_as_json_mean_the_same_unet(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(SD))
    unet = {
        "target": "x",
        "params": {**SD, "image_size": 32},
    }  # 32, unused: so it stands in Stable Diffusion's own file
    whole = {
        "model": {
            "params": {
                "linear_start": 0.0015,
                "timesteps": 500,
                "image_size": 8,
                "unet_config": unet,
            }
        }
    }
    (tmp_path / "ldm.yaml").write_text(json.dumps(whole))  # JSON is YAML
    plain, around = (UNetConfig.load(tmp_path / name) for name in ("params.json", "ldm.yaml"))
    assert plain.diffusers_config == around.diffusers_config
    assert (around.train_timesteps, around.betas[0]) == (500, 0.0015)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"channel_mult": None}, "channel_mult"),
        ({"resblock_updown": True}, "resblock_updown False"),
        ({"use_scale_shift_norm": 1}, "use_scale_shift_norm"),
        ({"channel_mult": []}, "channel_mult"),
        ({"attention_resolutions": [4, "2"]}, "attention_resolutions"),
        ({"transformer_depth": 0}, "transformer_depth"),
        ({"num_heads": 0}, "num_heads"),
        ({"in_channels": 4.0}, "in_channels"),
        ({"num_classes": 1000}, "num_classes 1000"),
        ({"dim_heads": 3}, "'dim_heads'"),
        ({"context_dim": None}, "context_dim"),
        ({"context_dim": 0}, "context_dim"),
        (
            {"use_spatial_transformer": False},
            "context_dim use_spatial_transformer",
        ),
        ({"num_head_channels": 64}, "num_head_channels 32 64"),
        ({"num_head_channels": 12}, "num_head_channels 32 12"),
        ({"num_heads": 3}, "num_heads 32 3"),
        ({"model_channels": 30}, "model_channels 32 30"),
        ({"image_size": 7}, "image_size 1 7"),
        ({"num_res_blocks": 10**9}, "num_res_blocks"),
        ({"transformer_depth": 10**9}, "transformer_depth"),
        ({"channel_mult": [1] * 10**5}, "channel_mult"),
        ({"attention_resolutions": [1] * 10**5}, "attention_resolutions"),
        ({"model_channels": 2**20}, "model_channels"),
        ({"channel_mult": [1, 2**14]}, "channel_mult"),
        ({"in_channels": 10**9}, "in_channels"),
        ({"image_size": 2**30}, "image_size"),
        ({"context_dim": 10**9}, "context_dim"),
        ({1: 2, "foo": 3}, "'1' 'foo'"),
        ({"num_heads": -1}, "num_heads num_head_channels"),
    ],
)
def test_a_unet_that_is_not_covered_is_refused(change: dict[str, Any], facts: str) -> None:
    with refused(*facts.split()):
        UNetConfig.from_params({**SD, **change})


@pytest.mark.parametrize(
    ("around", "facts"),
    [
        ({"image_size": "x"}, "image_size 'x'"),
        ({"timesteps": "x"}, "timesteps 'x'"),
        ({"timesteps": 0}, "timesteps 1 0"),
        ({"linear_start": "x"}, "linear_start 'x'"),
        ({"linear_start": 5}, "linear_start 0 1 5"),
        ({"linear_end": None}, "linear_end None"),
    ],
)
def test_a_model_around_the_unet_that_cannot_be_is_refused(
    around: dict[str, Any], facts: str
) -> None:
    with refused(*facts.split()):
        UNetConfig.from_params({"model": {"params": {**around, "unet_config": {"params": SD}}}})


@pytest.mark.parametrize("name", ["unet.json", "unet.yaml"])
def test_a_deeply_nested_configuration_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with refused(tmp_path / name, "YAML", "JSON"):
        UNetConfig.load(tmp_path / name)


def test_a_configuration_without_its_parts_or_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unet.yaml"
    with refused(path):
        UNetConfig.load(path)
    for text, facts in (
        ("a: [", "YAML JSON"),
        ("model: {}", "'params'"),
        ("a: &a [1]\nimage_size: *a", "*a"),
        ("{in_channels: 3}", "'image_size'"),
    ):
        path.write_text(text)
        with refused(path, *facts.split()):
            UNetConfig.load(path)
