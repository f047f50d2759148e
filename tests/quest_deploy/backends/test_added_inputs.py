"""Graphs and engines that take what ControlNets and T2I-adapters add, against the fake-quantized
model, and against those of the same checkpoint that take nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from exporters.graph_info import STATES, added_inputs, input_sizes, size_divisors
from exporters.torch_to_qdq import portable_graph
from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.backends.base import build_engine, input_shapes, open_engine
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.calibration.ptq import CalibrationOptions, calibrate
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.models.residuals import (
    IMAGE_PROMPT,
    adapter_residuals,
    controlnet_residuals,
    unpacked,
)
from quest_deploy.models.unets import with_flat_conditions
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.verification.checks import verify_engine
from quest_deploy.verification.reference import save_reference
from tests.helpers import refused, relative_error, run_reference
from tests.quest_deploy.support import MINI_UNET

UNET = {
    **MINI_UNET,
    "block_out_channels": (8, 12),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
RESIDUALS = {**controlnet_residuals(UNET), **adapter_residuals(UNET)}
CONTROLLED = 2
"""Of the three samplings that are recorded."""


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return with_flat_conditions(UNet2DConditionModel(**UNET).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def recorded(unet: nn.Module) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([900.0, 300.0])
    sample = torch.randn(2, 3, 2, 4, 4, generator=generator)
    states = torch.randn(3, 3, 8, generator=generator)
    residuals = {
        name: torch.randn(2, CONTROLLED, *x.shape(4, 4), generator=generator)
        for name, x in RESIDUALS.items()
    }
    found = Trajectories(
        sample, timesteps, sample, {"encoder_hidden_states": states}, residuals=residuals
    )
    rows = torch.arange(3)
    outputs = [
        unet(**found.inputs(torch.full((3,), step), rows), return_dict=False)[0] for step in (0, 1)
    ]
    return dataclasses.replace(found, output=torch.stack(outputs))


@pytest.fixture(scope="module")
def checkpoint(unet: nn.Module, recorded: Trajectories) -> Checkpoint:
    return calibrate("two", unet, recorded, Scheme.parse("w4a4", buckets=2), CalibrationOptions())


@pytest.fixture(scope="module")
def protos(checkpoint: Checkpoint, recorded: Trajectories) -> dict[str, onnx.ModelProto]:
    """The graph with the inputs and the one without."""
    without = dataclasses.replace(recorded, residuals={})
    return {
        name: ir.to_proto(
            portable_graph(checkpoint, next(x.batches(2)), "ab" * 32, added=tuple(x.residuals))
        )
        for name, x in (("with", recorded), ("without", without))
    }


@pytest.fixture(scope="module")
def engines(
    protos: dict[str, onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    built: dict[tuple[str, str], Path] = {}

    def engine(backend: str, kind: str) -> Path:
        if (backend, kind) not in built:
            folder = tmp_path_factory.mktemp(f"{backend}-{kind}")
            graph, options = ir.from_proto(protos[kind]), EngineOptions(threads=1)
            build_engine(get_backend(backend), graph, folder, options, "cd" * 32)
            built[backend, kind] = folder
        return built[backend, kind]

    return engine


def unet_of(engine: Path, backend: str) -> EngineUNet:
    from exporters.graph_info import load_graph

    graph = load_graph(engine / "lowered.onnx")
    return EngineUNet.of_graph(open_engine(get_backend(backend), engine), 2, graph)


def inputs_of(recorded: Trajectories) -> dict[str, Any]:
    return recorded.inputs(torch.tensor([0, 1]), torch.tensor([0, 1]))


SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "layers_per_block": 2,
}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}


def test_a_controlnet_of_stable_diffusion_adds_thirteen_tensors() -> None:
    shapes = [x.shape(64, 64) for x in controlnet_residuals(SD).values()]
    assert len(shapes) == 13
    assert shapes[:4] == [(320, 64, 64)] * 3 + [(320, 32, 32)]
    assert shapes[-2:] == [(1280, 8, 8)] * 2


def test_a_t2i_adapter_adds_what_those_of_stable_diffusion_and_its_xl_give() -> None:
    from diffusers import T2IAdapter

    for config, kind, factor in ((SD, "full_adapter", 8), (XL, "full_adapter_xl", 16)):
        channels = [*config["block_out_channels"], 1280][:4]
        made = T2IAdapter(channels=channels, downscale_factor=factor, adapter_type=kind)
        features = [tuple(x.shape[1:]) for x in made(torch.zeros(1, 3, 256, 256))]
        expected = [x.shape(32, 32) for x in adapter_residuals(config).values()]
        assert features == expected[: len(features)], kind


@pytest.mark.parametrize("residuals", [controlnet_residuals, adapter_residuals])
def test_other_blocks_are_refused_by_name(residuals: Any) -> None:
    with refused("AttnDownBlock2D"):
        residuals({**UNET, "down_block_types": ("AttnDownBlock2D", "DownBlock2D")})


def test_the_inputs_are_diffusers_own_arguments(unet: nn.Module, recorded: Trajectories) -> None:
    from diffusers import UNet2DConditionModel

    inputs = inputs_of(recorded)
    named = {name: inputs.pop(name) for name in RESIDUALS}
    down, inside = (
        [value for name, value in named.items() if name.startswith(f"down_{kind}_")]
        for kind in ("block", "intrablock")
    )
    arguments = {
        "down_block_additional_residuals": tuple(down),
        "mid_block_additional_residual": named["mid_block_additional_residual"],
        "down_intrablock_additional_residuals": inside,
    }
    assert unpacked(arguments).keys() == named.keys()
    theirs = UNet2DConditionModel.forward(unet, **inputs, **arguments).sample  # type: ignore[arg-type]
    assert torch.equal(unet(**inputs, **named).sample, theirs)


def test_rows_without_a_controlnet_have_zeros(recorded: Trajectories) -> None:
    inputs = recorded.inputs(torch.tensor([1, 1]), torch.tensor([1, 2]))
    for name in RESIDUALS:
        assert torch.equal(inputs[name][0], recorded.residuals[name][1, 1])
        assert not inputs[name][1].any()


def test_fewer_rows_are_of_both_kinds_alike(recorded: Trajectories) -> None:
    assert (recorded.controlled, recorded.first(2).controlled) == (2, 1)
    assert torch.equal(recorded.first(2).sample[:, 1], recorded.sample[:, 2])


def test_trajectories_are_read_as_they_were_saved(recorded: Trajectories, tmp_path: Path) -> None:
    path = tmp_path / "trajectories.safetensors"
    recorded.save(path)
    again = Trajectories.load(path)
    assert again.recorded.keys() == recorded.recorded.keys()
    assert all(torch.equal(again.recorded[k], x) for k, x in recorded.recorded.items())


def test_the_graph_takes_them_at_parts_of_the_samples_size(
    protos: dict[str, onnx.ModelProto],
) -> None:
    graph = ir.from_proto(protos["with"])
    onnx.checker.check_model(protos["with"], full_check=True)
    assert added_inputs(graph) == tuple(RESIDUALS)
    divisors = {name: x.divisor for name, x in RESIDUALS.items()}
    assert size_divisors(graph) == {"sample": 1, **divisors}
    shapes = input_shapes(graph, 5)
    assert shapes.items() >= {name: (5, *x.shape(4, 4)) for name, x in RESIDUALS.items()}.items()
    without = ir.from_proto(protos["without"])
    assert added_inputs(without) == ()
    assert list(input_sizes(without)) == ["sample", "timestep", "encoder_hidden_states"]


def test_in_the_graph_zeros_are_none_to_the_bit_at_another_size_too(
    protos: dict[str, onnx.ModelProto],
) -> None:
    rng = np.random.default_rng(2)
    feeds = {
        "sample": rng.standard_normal((2, 2, 8, 4)).astype(np.float32),
        "timestep": np.float32([10, 900]),
        "encoder_hidden_states": rng.standard_normal((2, 3, 8)).astype(np.float32),
    }
    zeros = {name: np.zeros((2, *x.shape(8, 4)), np.float32) for name, x in RESIDUALS.items()}
    (expected,) = run_reference(protos["without"], feeds)
    (found,) = run_reference(protos["with"], feeds | zeros)
    np.testing.assert_array_equal(found, expected)


def test_the_fake_quantized_model_takes_zeros_for_none_to_the_bit(
    checkpoint: Checkpoint, recorded: Trajectories
) -> None:
    model = QuantizedModel.from_checkpoint(checkpoint).eval()
    inputs = inputs_of(recorded)
    plain = {name: value for name, value in inputs.items() if name not in RESIDUALS}
    zeros = {name: torch.zeros_like(inputs[name]) for name in RESIDUALS}
    with torch.no_grad():
        assert torch.equal(model(**plain, **zeros), model(**plain))
        assert not torch.equal(model(**inputs), model(**plain))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_with_them_verifies(
    backend: str,
    engines: Callable[[str, str], Path],
    checkpoint: Checkpoint,
    recorded: Trajectories,
    tmp_path: Path,
) -> None:
    save_reference(QuantizedModel.from_checkpoint(checkpoint).eval(), recorded, tmp_path)
    engine, options = engines(backend, "with"), EngineOptions(threads=1)
    found = verify_engine(get_backend(backend), options, engine, tmp_path)
    assert found.passed, found.problems
    with refused(*RESIDUALS):  # an engine without them, by a reference of one with them
        verify_engine(get_backend(backend), options, engines(backend, "without"), tmp_path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_without_a_controlnet_computes_as_one_without_its_inputs(
    backend: str, engines: Callable[[str, str], Path], recorded: Trajectories
) -> None:
    inputs = {name: value.numpy() for name, value in inputs_of(recorded).items()}
    plain = {name: value for name, value in inputs.items() if name not in RESIDUALS}
    with (
        unet_of(engines(backend, "with"), backend) as mine,
        unet_of(engines(backend, "without"), backend) as theirs,
    ):
        expected, added = theirs.predict(**plain), mine.predict(**inputs)
        np.testing.assert_array_equal(mine.predict(**plain), expected)
        assert relative_error(added, expected) > 0.01
        with refused("mid_block_additional_residual"):
            theirs.predict(**inputs)


def test_what_is_added_must_have_its_unets_channels_and_the_samples_size(
    engines: Callable[[str, str], Path], recorded: Trajectories
) -> None:
    inputs = {name: value.numpy() for name, value in inputs_of(recorded).items()}
    middle = "mid_block_additional_residual"
    with unet_of(engines("onnxruntime", "with"), "onnxruntime") as unet:
        for wrong in (np.zeros((2, 12, 4, 4)), np.zeros((2, 12, 1, 1)), np.zeros((2, 8, 2, 2))):
            with refused(middle, "[any, 12, 2, 2]", list(wrong.shape)) as caught:
                unet.predict(**{**inputs, middle: wrong})
            assert "tokens" not in str(caught.value)
        with refused("sample", [2, 2, 4]):
            unet.predict(inputs["sample"][..., 0], 1, **{STATES: inputs[STATES]})


@pytest.mark.slow
def test_tensorrt_for_rtx_builds_it_with_their_sizes_in_its_profile(
    protos: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    from quest_deploy.backends.tensorrt.base import profile_shapes

    options = EngineOptions(sample_size=((8, 4), (16, 8)), compute_capability=("89",), max_batch=3)
    graph = ir.from_proto(protos["with"])
    build_engine(get_backend("tensorrt-rtx"), graph, tmp_path, options, "cd" * 32)
    network = _Network({x.name or "": x.shape for x in graph.graph.inputs})
    first, second = profile_shapes(network, tmp_path / "lowered.onnx", options)
    for name, x in RESIDUALS.items():
        assert first[name] == ([1, *x.shape(8, 4)], [2, *x.shape(8, 4)], [3, *x.shape(8, 4)])
        assert second[name][2] == [3, *x.shape(16, 8)]


class _Network:
    """The inputs of a network, as TensorRT has them after parsing."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self._inputs, self.num_inputs = list(inputs.items()), len(inputs)

    def get_input(self, index: int) -> Any:
        name, shape = self._inputs[index]
        sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
        return SimpleNamespace(name=name, shape=sizes)


@pytest.mark.parametrize("name", IMAGE_PROMPT)
def test_one_of_an_ip_adapters_inputs_alone_is_refused(name: str) -> None:
    runner: Any = None  # which is not asked
    engine = EngineUNet(runner, added=dict.fromkeys(IMAGE_PROMPT, 1))
    with refused(*IMAGE_PROMPT):
        engine.predict(np.zeros((1, 2, 4, 4)), 0.0, **{name: np.zeros((1, 1, 1))})
