"""Shared fixtures: a UNet of 65 layers with Stable Diffusion's topology, calibrated on random data,
and its portable graph.

And which tests are slow, and in which order they run.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from quest_deploy.artifacts.scheme import Scheme
from tests.helpers import hand_checkpoint, hand_graph
from tests.pipelines import PIPELINES, TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx
    import onnx_ir as ir
    import torch
    from torch import nn

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.trajectories import Trajectories

# Small tensors: a second thread only waits for the first, for long on a busy machine. Read when
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C, and so would the processes that tests start and then
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("quest", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("quest")

UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))
"""When slow tests begin no more, in seconds since 1970."""
SLOW_FIXTURES = frozenset(
    {
        "build",
        "chain",
        "denoise",
        "emulated",
        "flux_chain",
        "ldm_chain",
        "pixart_chain",
        "sd3_chain",
        "without_headers",
        "xl",
    }
)
"""They take many seconds, up to minutes: what asks for one is slow without saying so."""
STAGES = (
    frozenset(
        {
            "small_unet",
            "mini_unet",
            "mini_emoji",
            "emoji",
            "compared",
            "pipelines",
            "files",
            "text_chain",
            "pixart_chain",
            "sd3_chain",
            "flux_chain",
            "label_chain",
            "made",
            "host",
            "reference",
        }
    ),
    frozenset({"mini_chain"}),
)
"""Files that need none of these run first, then those that need a model or a compiler, then those
that copy the small chain.

One worker makes that chain for ``made``, in the middle, while the other has files to run.
"""
SMALL_UNET = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TIMESTEPS = (990.0, 700.0, 400.0, 120.0)
"""One in each bucket of a scheme of four."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a slow test for which no time is left."""
    if time.time() > UNTIL and item.get_closest_marker("slow") is not None:
        pytest.skip("no time is left for it (TESTS_UNTIL)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow by what it asks for, before ``-m`` selects, and let the quick files run
    first, so that a run fails early.
    """
    stages: dict[Path, int] = {}
    for item in items:
        fixtures = frozenset(
            getattr(item, "fixturenames", ())
        )  # also those that its fixtures ask for
        if fixtures & SLOW_FIXTURES:
            item.add_marker(pytest.mark.slow)
        stage = max((i for i, needs in enumerate(STAGES, 1) if fixtures & needs), default=0)
        stages[item.path] = max(stage, stages.get(item.path, 0))
    items.sort(key=lambda item: stages[item.path])


@pytest.fixture(scope="session")
def small_unet() -> nn.Module:
    """A float UNet with random weights: time embedding, resnets, self- and cross-attention, skips,
    shortcuts, resampling.
    """
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DConditionModel(**SMALL_UNET)
    return unet.eval()


@pytest.fixture(scope="session")
def small_trajectories() -> Trajectories:
    """Random "recordings" that visit four buckets: three samplings of four steps."""
    import torch

    from quest_deploy.calibration.trajectories import Trajectories

    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(len(TIMESTEPS), 3, 2, 4, 4, generator=generator)
    states = torch.randn(3, 3, 8, generator=generator)
    return Trajectories(
        sample, torch.tensor(TIMESTEPS), sample.clone(), {"encoder_hidden_states": states}
    )


@pytest.fixture(scope="session")
def small_checkpoint(small_unet: nn.Module, small_trajectories: Trajectories) -> Checkpoint:
    """``small_unet`` calibrated to w4a4 with four buckets."""
    from quest_deploy.calibration.ptq import CalibrationOptions, calibrate

    return calibrate(
        "small",
        small_unet,
        small_trajectories,
        Scheme.parse("w4a4", buckets=4),
        CalibrationOptions(),
    )


@pytest.fixture(scope="session")
def small_inputs() -> dict[str, torch.Tensor]:
    """A batch of five samples, each at its own timestep, in all four buckets."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(5, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([999.0, 100.5, 600.0, 250.0, 30.0]),
        "encoder_hidden_states": torch.randn(5, 3, 8, generator=generator),
    }


@pytest.fixture(scope="session")
def small_proto(
    small_checkpoint: Checkpoint, small_inputs: dict[str, torch.Tensor]
) -> onnx.ModelProto:
    """The portable graph of ``small_checkpoint``; not to be changed."""
    import onnx_ir as ir

    from exporters.torch_to_qdq import portable_graph

    return ir.to_proto(portable_graph(small_checkpoint, small_inputs, "ab" * 32))


@pytest.fixture
def small_graph(small_proto: onnx.ModelProto) -> ir.Model:
    """A fresh copy of the portable graph, for passes to change."""
    import onnx_ir as ir

    return ir.from_proto(small_proto)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small pipeline's folder in the hub's layout, by its name in ``tests.pipelines.PIPELINES`` or
    ``TRANSFORMERS``; not to be changed.
    """

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = (PIPELINES | TRANSFORMERS)[name](
                tmp_path_factory.mktemp("pipelines") / name
            )
        return made[name]

    return folder


@pytest.fixture
def hand() -> Checkpoint:
    """A small checkpoint with every kind of layer and two buckets."""
    return hand_checkpoint()


@pytest.fixture
def hand_model(hand: Checkpoint) -> ir.Model:
    """The quantized graph of ``hand``, before any lowering."""
    return hand_graph(hand)
