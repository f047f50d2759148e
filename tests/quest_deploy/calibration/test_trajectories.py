"""What is recorded of samplings; what is not finite is told with step, timestep and tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from quest_deploy.calibration.trajectories import Trajectories, record_trajectories
from quest_deploy.errors import QuestDeployError
from quest_deploy.models.loading import load_model, resolve_source
from quest_deploy.models.residuals import IMAGE_SCALE, IMAGE_TOKENS
from tests.helpers import refused


@pytest.fixture
def model(pipelines: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(pipelines("sd"), tmp_path / "model")


def record(folder: Path, **options: Any) -> Any:
    model = load_model(resolve_source(str(folder)))
    given = {"steps": 2, "samples": 1, "seed": 0, **options}
    return record_trajectories(model, model.load_unet(), **given)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(("guidance", "parts"), [(1.0, 1), (4.0, 2)])
def test_the_rows_of_a_guided_sampling_are_recorded_in_turn(
    model: Path, guidance: float, parts: int
) -> None:
    recorded = record(model, samples=3, guidance=guidance)
    assert recorded.parts == parts
    assert recorded.sample.shape[1] == 3 * parts
    samplings = recorded.sample.unflatten(1, (-1, parts))
    assert torch.equal(samplings, samplings[:, :, :1].expand_as(samplings))
    assert len(samplings.flatten(2)[0, :, 0].unique()) == 3
    assert recorded.first(2 * parts).parts == parts
    assert recorded.first(1).parts == 1


@pytest.mark.parametrize(
    ("rows", "added", "plain"), [(1, 2, 2), (2, 2, 2), (5, 2, 2), (6, 2, 4), (7, 2, 4), (8, 4, 4)]
)
@pytest.mark.parametrize("prompted", [False, True], ids=["controlnet", "ip-adapter"])
def test_the_first_rows_are_whole_samplings_of_which_some_have_what_is_added(
    prompted: bool, rows: int, added: int, plain: int
) -> None:
    sample = torch.arange(8.0).expand(2, -1)[:, :, None]
    scale = torch.tensor([0.5] * 4 + [0.0] * 4)
    conditions = {IMAGE_TOKENS: scale[:, None, None], IMAGE_SCALE: scale} if prompted else {}
    residuals = {} if prompted else {"mid_block_additional_residual": torch.ones(2, 4, 1)}
    made = Trajectories(sample, torch.tensor([9.0, 1.0]), sample, conditions, 2, residuals)
    found = made.first(rows)
    assert (found.controlled, found.parts) == (added, 2)
    assert found.sample[0, :, 0].tolist() == [*range(added), *range(4, 4 + plain)]


def test_zero_terminal_snr_cannot_be_sampled_with_epsilon_predictions(model: Path) -> None:
    configure(model, **ZERO_SNR)
    with refused("sample", "timestep 999", "epsilon"):
        record(model)


def test_zero_terminal_snr_is_sampled_with_v_predictions(model: Path) -> None:
    configure(model, **ZERO_SNR, prediction_type="v_prediction")
    assert record(model).timestep.tolist() == [999, 499]


def test_what_is_added_to_the_unet_is_not_called_the_unet(model: Path) -> None:
    class Failing:
        def images(self, latents: Any) -> dict[str, torch.Tensor]:
            return {}

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("shapes cannot be multiplied")

    with refused("added", "shapes cannot be multiplied"):
        record(model, control=Failing())


def test_an_output_that_overflows_is_told_with_its_timestep(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in ("conv_norm_out.weight", "conv_out.weight"):
        tensors[name] *= 1e30
    save_file(tensors, path, metadata={"format": "pt"})
    with refused("output", "timestep 501", "step 1 of 2", error=QuestDeployError):
        record(model)


def test_a_condition_that_is_not_finite_is_named(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(pipelines("class-tokens"), tmp_path / "model")
    table = load_file(model / "class_embedding.safetensors")["weight"]
    save_file({"weight": table * float("inf")}, model / "class_embedding.safetensors")
    with refused("encoder_hidden_states"):
        record(model)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_sampling_draws_from_finite_weights_alone(model: Path, name: str) -> None:
    path = next((model / name).glob("*.safetensors"))
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key] = torch.full_like(tensors[key], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    with refused(model / name, "finite"):
        record(model)


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (lambda: torch.ones(10**15), RuntimeError),
        (lambda: bytearray(10**15), MemoryError),
        (lambda: Path("/no/such/file").read_bytes(), OSError),
    ],
    ids=["torch", "Python", "a file"],
)
def test_a_machine_without_memory_or_files_is_not_the_unets_fault(
    model: Path, fail: Callable[[], Any], error: type[Exception]
) -> None:
    loaded, unet = load_model(resolve_source(str(model))), cast("Any", lambda *_, **__: fail())
    with pytest.raises(error):
        record_trajectories(loaded, unet, steps=2, samples=1, seed=0)
