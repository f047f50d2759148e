from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from quest_deploy.checkpoint import Checkpoint, SiteData, load_checkpoint, save_checkpoint
from quest_deploy.errors import InputError
from quest_deploy.quant.calibrate import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.quant.model import QuantizedModel
from quest_deploy.quant.reconstruct import ReconstructOptions, _SoftRounding, reconstruct, units_of
from quest_deploy.scheme import Granularity, Scheme
from quest_deploy.trajectories import Trajectories

OPTIONS = ReconstructOptions(samples=32, rounding_steps=60, scale_steps=10, batch=8)


def schemes() -> dict[str, Scheme]:
    return {
        "folded, 3 buckets": Scheme.parse("w4a4", buckets=3),
        "everything quantized": Scheme.parse(
            "w4a4", buckets=2, granularity=Granularity.PER_TENSOR, attention_bits=8, softmax_bits=8, split_shortcuts=True
        ),
        "free channels": Scheme.parse("w4a8", buckets=2, granularity=Granularity.FREE_CHANNEL),
    }


@pytest.fixture(scope="module", params=schemes().values(), ids=schemes().keys())
def start(request: pytest.FixtureRequest, mini_unet: nn.Module, mini_trajectories: Trajectories) -> Checkpoint:
    return calibrate("mini", mini_unet, mini_trajectories, request.param, CalibrationOptions(RangeMethod.L24))


@pytest.fixture(scope="module")
def learned(start: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories) -> Checkpoint:
    return reconstruct(mini_unet, start, mini_trajectories, OPTIONS)


def test_every_weight_is_rounded_to_the_code_below_or_above(start: Checkpoint, learned: Checkpoint, mini_unet: nn.Module) -> None:
    student = QuantizedModel.from_checkpoint(start, mini_unet)
    moved = 0
    for name, layer in student.quantized_layers().items():
        ratio = (layer.weight / layer.weight_scale.view(-1, *[1] * (layer.weight.dim() - 1))).detach().numpy()
        low, high = layer.weight_low[0].item(), layer.weight_high[0].item()
        codes = learned.layers[name].weight_codes
        assert (codes >= np.clip(np.floor(ratio), low, high)).all()
        assert (codes <= np.clip(np.floor(ratio) + 1, low, high)).all()
        moved += int((codes != start.layers[name].weight_codes).sum())
        np.testing.assert_array_equal(learned.layers[name].weight_scale, start.layers[name].weight_scale)
    assert moved


def test_the_reconstructed_model_is_nearer_to_the_float_one(
    start: Checkpoint, learned: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories
) -> None:
    def error(checkpoint: Checkpoint) -> float:
        model = QuantizedModel.from_checkpoint(checkpoint).eval()
        batches = list(mini_trajectories.batches(8))
        with torch.no_grad():
            return float(sum((model(**x) - mini_unet(**x, return_dict=False)[0]).square().mean() for x in batches))

    assert error(learned) < error(start)


def test_scales_are_learned_and_nothing_else_changes(start: Checkpoint, learned: Checkpoint) -> None:
    assert any((learned.sites[name].scale != site.scale).any() for name, site in start.sites.items())
    for name, site in start.sites.items():
        if isinstance(site, SiteData):
            np.testing.assert_array_equal(learned.sites[name].low, site.low)  # type: ignore[union-attr]
            np.testing.assert_array_equal(learned.sites[name].channel, site.channel)  # type: ignore[union-attr]
    for key, value in start.floats.items():
        np.testing.assert_array_equal(learned.floats[key], value)
    assert (learned.provenance["method"], learned.provenance["range"]) == ("qdiff", "l2.4")


def test_it_is_a_checkpoint_like_any_other(learned: Checkpoint, tmp_path: object) -> None:
    path = tmp_path / "learned.safetensors"  # type: ignore[operator]
    save_checkpoint(learned, path)
    again = load_checkpoint(path)
    for name, layer in learned.layers.items():
        np.testing.assert_array_equal(again.layers[name].weight_codes, layer.weight_codes)


def test_the_same_seed_gives_the_same_checkpoint(mini_unet: nn.Module, mini_trajectories: Trajectories) -> None:
    start = calibrate("mini", mini_unet, mini_trajectories, Scheme.parse("w4a4", buckets=2), CalibrationOptions())
    few = ReconstructOptions(samples=8, rounding_steps=3, scale_steps=2, batch=4, seed=3)
    first, second = (reconstruct(mini_unet, start, mini_trajectories, few) for _ in range(2))
    for name, layer in first.layers.items():
        np.testing.assert_array_equal(second.layers[name].weight_codes, layer.weight_codes)
    for name, site in first.sites.items():
        np.testing.assert_array_equal(second.sites[name].scale, site.scale)


def test_every_layer_is_in_one_unit_and_units_come_in_execution_order(start: Checkpoint, mini_unet: nn.Module) -> None:
    units = units_of(QuantizedModel.from_checkpoint(start, mini_unet))
    layers = [layer for unit in units.values() for layer in unit]
    assert sorted(layers) == sorted(start.layers)
    order = list(start.layers)
    firsts = [order.index(unit[0]) for unit in units.values()]
    assert firsts == sorted(firsts)
    kinds = {type(mini_unet.get_submodule(name)).__name__ for name, unit in units.items() if len(unit) > 1}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert all(name == unit[0] for name, unit in units.items() if name in order)


def test_no_steps_leave_the_codes_and_scales_alone(start: Checkpoint, mini_unet: nn.Module, mini_trajectories: Trajectories) -> None:
    same = reconstruct(mini_unet, start, mini_trajectories, ReconstructOptions(samples=4, rounding_steps=0, scale_steps=0, batch=4))
    for name, layer in start.layers.items():
        np.testing.assert_array_equal(same.layers[name].weight_codes, layer.weight_codes)
    for name, site in start.sites.items():
        np.testing.assert_array_equal(same.sites[name].scale, site.scale)


def test_soft_rounding_starts_at_the_float_weight_inside_the_range(start: Checkpoint, mini_unet: nn.Module) -> None:
    layer = next(iter(QuantizedModel.from_checkpoint(start, mini_unet).quantized_layers().values()))
    soft = _SoftRounding(layer)
    weight = torch.clamp(soft.floor + soft.share_up(), soft.low, soft.high) * soft.scale
    inside = (layer.weight / soft.scale >= soft.low) & (layer.weight / soft.scale <= soft.high)
    torch.testing.assert_close(weight[inside], layer.weight[inside], rtol=1e-4, atol=1e-6)


def test_undecided_weights_cost_and_decided_ones_do_not(start: Checkpoint, mini_unet: nn.Module) -> None:
    soft = _SoftRounding(next(iter(QuantizedModel.from_checkpoint(start, mini_unet).quantized_layers().values())))
    with torch.no_grad():
        soft.alpha.fill_(0.0)
        assert soft.undecided(2.0).item() == pytest.approx(soft.alpha.numel())
        soft.alpha.fill_(9.0)
        assert soft.undecided(20.0).item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch": 0}, {"rounding_steps": -1}, {"scale_steps": -1}])
def test_impossible_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="reconstruction needs"):
        ReconstructOptions(**wrong)  # type: ignore[arg-type]
