"""Shared fixtures of the pipeline's tests: a very small model with its engines, and workspaces that
went through every command.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.backends.base import build_engine
from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.models.registry import EMBEDDED, EMBEDDED_FOLDER, KNOWN_MODELS
from tests.pipelines import PIPELINES, TRANSFORMERS
from tests.quest_deploy.support import (
    CHAIN,
    FLUX_CHAIN,
    LABEL_CHAIN,
    LDM_CHAIN,
    MINI_EMOJI_UNET,
    MINI_UNET,
    PIXART_CHAIN,
    SD3_CHAIN,
    TEXT_CHAIN,
    Chain,
    Outcome,
    cli,
    in_this_process,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import onnx
    from torch import nn

    from quest_deploy.artifacts.checkpoint import Checkpoint
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.quantization.model import QuantizedModel


@pytest.fixture(scope="session")
def mini_unet() -> nn.Module:
    """A float UNet of 27 layers with random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DConditionModel(**MINI_UNET)
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def mini_trajectories(mini_unet: nn.Module) -> Trajectories:
    """What ``mini_unet`` answers to random inputs: four samplings of six steps, two in each of
    three buckets.
    """
    import torch

    from quest_deploy.calibration.trajectories import Trajectories

    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([990.0, 820.0, 610.0, 400.0, 210.0, 10.0])
    sample = torch.randn(len(timesteps), 4, 2, 4, 4, generator=generator)
    states = torch.randn(4, 3, 8, generator=generator)
    output = torch.stack(
        [
            mini_unet(x, t, states, return_dict=False)[0]
            for x, t in zip(sample, timesteps, strict=True)
        ]
    )
    return Trajectories(sample, timesteps, output, {"encoder_hidden_states": states})


@pytest.fixture(scope="session")
def mini_checkpoints(
    mini_unet: nn.Module, mini_trajectories: Trajectories
) -> Callable[[int], Checkpoint]:
    """``mini_unet`` calibrated to w4a4, by number of buckets."""
    from quest_deploy.calibration.ptq import CalibrationOptions, calibrate

    return lambda buckets: calibrate(
        "mini",
        mini_unet,
        mini_trajectories,
        Scheme.parse("w4a4", buckets=buckets),
        CalibrationOptions(),
    )


@pytest.fixture(scope="session")
def mini_checkpoint(mini_checkpoints: Callable[[int], Checkpoint]) -> Checkpoint:
    """``mini_unet`` calibrated to w4a4 with three buckets."""
    return mini_checkpoints(3)


@pytest.fixture(scope="session")
def mini_quantized(mini_checkpoint: Checkpoint) -> QuantizedModel:
    """The fake-quantized model of ``mini_checkpoint``."""
    from quest_deploy.quantization.model import QuantizedModel

    return QuantizedModel.from_checkpoint(mini_checkpoint).eval()


@pytest.fixture(scope="session")
def mini_proto(mini_checkpoint: Checkpoint, mini_trajectories: Trajectories) -> onnx.ModelProto:
    """The portable graph of ``mini_checkpoint``; not to be changed."""
    import onnx_ir as ir

    from exporters.torch_to_qdq import portable_graph

    return ir.to_proto(
        portable_graph(mini_checkpoint, next(mini_trajectories.batches(2)), "ab" * 32)
    )


@pytest.fixture(scope="session")
def mini_reference(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The reference of ``mini_quantized``; not to be changed."""
    from quest_deploy.verification.reference import save_reference

    folder = tmp_path_factory.mktemp("reference")
    save_reference(mini_quantized, mini_trajectories, folder)
    return folder


@pytest.fixture(scope="session")
def mini_engines(
    mini_proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The engine folder of ``mini_proto`` by backend; not to be changed."""
    import onnx_ir as ir

    built: dict[str, Path] = {}

    def engine(backend: str) -> Path:
        if backend not in built:
            folder = tmp_path_factory.mktemp(backend)
            build_engine(
                get_backend(backend),
                ir.from_proto(mini_proto),
                folder,
                EngineOptions(threads=1),
                "cd" * 32,
            )
            built[backend] = folder
        return built[backend]

    return engine


@pytest.fixture(scope="session")
def emoji() -> PipelineModel:
    """The embedded model."""
    from quest_deploy.models.loading import load_model, resolve_source

    return load_model(resolve_source("emoji"))


@contextmanager
def _mini_emoji() -> Iterator[None]:
    """The embedded model's UNet is, meanwhile, one of 27 layers with random weights, of which two
    have eight bits by default: a command takes a fifth of the time.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from quest_deploy.models.pipeline_model import PipelineModel

    others = PipelineModel.load_unet

    def load_unet(model: PipelineModel, *, narrow: bool = False) -> nn.Module:
        if model.folder != EMBEDDED_FOLDER:
            return others(model, narrow=narrow)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet: nn.Module = UNet2DConditionModel(**MINI_EMOJI_UNET)
        return unet.eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineModel, "load_unet", load_unet)
        patch.setitem(KNOWN_MODELS[EMBEDDED].defaults, "eight_bit_layers", ("*.conv_shortcut*",))
        yield


@pytest.fixture
def mini_emoji() -> Iterator[None]:
    """The embedded model's UNet is a very small one during the test; in other processes it is what
    it was.
    """
    with _mini_emoji():
        yield


@pytest.fixture(scope="session")
def mini_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """The embedded model with a very small UNet, through every command. Workers share one.

    A command that loads the UNet again needs ``mini_emoji``.
    """
    with ExitStack() as held:
        with _mini_emoji():
            made = held.enter_context(_chain("mini-chain", CHAIN, tmp_path_factory))
        yield made


def _shared(name: str, steps: Mapping[str, list[str]]) -> Any:
    """A fixture: a model through every command of ``steps``. Workers share one."""

    @pytest.fixture(scope="session")
    def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
        with _chain(name, steps, tmp_path_factory) as made:
            yield made

    return shared


chain = _shared("chain", CHAIN)
"""The embedded model, with few samples and steps, each command with --json."""
text_chain = _shared("sd", TEXT_CHAIN)
"""The small text-to-image pipeline."""
pixart_chain = _shared("pixart", PIXART_CHAIN)
"""The small pipeline of PixArt-Sigma."""
sd3_chain = _shared("sd3", SD3_CHAIN)
"""The small pipeline of Stable Diffusion 3.5."""
flux_chain = _shared("flux", FLUX_CHAIN)
"""The small pipeline of FLUX.1-dev."""
label_chain = _shared("class-pixels", LABEL_CHAIN)
"""The small class-conditional pipeline on pixels, as far as an engine."""
ldm_chain = _shared("ldm", LDM_CHAIN)
"""The small unconditional latent-diffusion pipeline."""


@contextmanager
def _chain(
    name: str, steps: Mapping[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chain]:
    """The workspace of ``steps``, made once for all workers and then held, so that a test that
    would write to it fails, always.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root, record, pipeline = base / name, base / f"{name}.json", base / f"{name}-pipeline"
    with (base / f"{name}.lock").open("w") as lock, ExitStack() as held:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if steps is not CHAIN:
            held.enter_context(in_this_process())
        if not record.exists():
            shutil.rmtree(root, ignore_errors=True)
            outcomes = {}
            for step, options in steps.items():
                command, _, backend = step.partition(" ")
                where = ["--backend", backend] if backend else []
                if command == "calibrate" and name in (made := PIPELINES | TRANSFORMERS):
                    where += ["--model", str(made[name](pipeline))]
                outcomes[step] = dataclasses.asdict(
                    cli(command, "-w", root, *where, *options, "--json")
                )
                assert outcomes[step]["code"] == 0, f"{step}: {outcomes[step]['err']}"
            record.write_text(json.dumps(outcomes))
    with (root / ".lock").open("r") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield Chain(
            root,
            {step: Outcome(**outcome) for step, outcome in json.loads(record.read_text()).items()},
        )


@pytest.fixture
def workspace(mini_chain: Chain, mini_emoji: None, tmp_path: Path) -> Path:
    """A copy of the small chain's workspace, to be changed by commands in this process."""
    return _copy(mini_chain, tmp_path)


@pytest.fixture
def emoji_workspace(chain: Chain, tmp_path: Path) -> Path:
    """A copy of the chain's workspace, to be changed, also by other processes."""
    return _copy(chain, tmp_path)


def _copy(chain: Chain, folder: Path) -> Path:
    copy = folder / "workspace"
    shutil.copytree(chain.root, copy, ignore=shutil.ignore_patterns("model.engine"))
    return copy
