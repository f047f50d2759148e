"""Files of tensors that would take more memory than they have bytes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.graph_info import load_graph
from quest_deploy.artifacts.model_source import fingerprint
from quest_deploy.calibration.training_state import TrainingState
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.evaluation.memory import peak_memory, reset_peak_memory
from quest_deploy.files import check_archive
from quest_deploy.finetuning.teacher_cache import TargetStream
from quest_deploy.models.loading import load_model, resolve_source
from tests.helpers import refused


def deflated(path: Path, megabytes: int) -> Path:
    """A file as torch.save writes it, but compressed: zeros take a thousandth."""
    whole = path.with_suffix(".whole")
    torch.save({"a": torch.zeros(megabytes * 2**18)}, whole)
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    whole.unlink()
    return path


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = deflated(tmp_path / "model.ckpt", 512)
    assert bomb.stat().st_size < 2**20
    reset_peak_memory()
    before = peak_memory()
    with refused(bomb):
        check_archive(bomb)
    with refused(bomb):
        load_model(resolve_source(str(bomb)))
    with refused(bomb):
        TrainingState.load(bomb, "key")
    assert peak_memory() - before < 2**28


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "model.ckpt", {}
    content["state_dict"] = content
    torch.save(content, path)
    with refused(path, "state_dict"):
        load_model(resolve_source(str(path)))


def test_what_torch_itself_saves_is_taken(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save({"a": torch.ones(10)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        check_archive(tmp_path / "a.pt")


def test_targets_of_an_impossible_size_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "targets.bin"
    path.write_text('{"key": "k", "first": 0, "shapes": [[1000000000000]]}\n')
    assert TargetStream(path, "k", 2**30).read(0) is None


@pytest.mark.parametrize("name", ["state.pt", "targets.bin"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    if name == "state.pt":
        with refused(path):
            TrainingState.load(path, "key")
    else:
        assert TargetStream(path, "k", 1).read(0) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x | {"timestep": x["timestep"][:1]},
        lambda x: x | {"output": x["output"][:, :1]},
        lambda x: x | {"sample": x["sample"].double()},
        lambda x: x | {"sample": x["sample"][0, 0]},
        lambda x: x | {"condition.a": torch.ones(7, 2)},
        lambda x: x | {"output": x["output"] * np.nan},
        lambda x: {name: tensor for name, tensor in x.items() if name != "output"},
        lambda x: {name: tensor for name, tensor in x.items() if name != "parts"},
        lambda x: x | {"parts": torch.tensor(0)},
        lambda x: x | {"parts": torch.tensor(3)},
        lambda x: x | {"parts": torch.tensor(2.0)},
        lambda x: x | {"parts": torch.tensor([1, 2])},
    ],
)
def test_trajectories_that_do_not_belong_together_are_refused(tmp_path: Path, change) -> None:  # noqa: ANN001
    from safetensors.torch import save_file

    whole = {
        "sample": torch.ones(3, 2, 1, 4, 4),
        "timestep": torch.tensor([9.0, 5.0, 1.0]),
        "output": torch.ones(3, 2, 1, 4, 4),
        "condition.a": torch.ones(2, 2),
        "parts": torch.tensor(2),
    }
    path = tmp_path / "trajectories.safetensors"
    save_file(whole, path)
    assert Trajectories.load(path).parts == 2
    save_file({name: x.contiguous() for name, x in change(whole).items()}, path)
    with refused(path, "quest-deploy calibrate"):
        Trajectories.load(path)


def test_a_huge_file_in_a_models_folder_is_not_held_in_memory(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    before = fingerprint(tmp_path)
    os.truncate(tmp_path / "tokenizer.json", 2**30)
    reset_peak_memory()
    held = peak_memory()
    assert fingerprint(tmp_path) != before
    assert peak_memory() - held < 2**26


def test_a_graph_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    graph = tmp_path / "unet.onnx"
    graph.touch()
    os.truncate(graph, 2**30)
    reset_peak_memory()
    held = peak_memory()
    with refused(graph):
        load_graph(graph)
    assert peak_memory() - held < 2**26
