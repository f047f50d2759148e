from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open

from exporters.graph_info import graph_info
from exporters.passes.cut import upstream
from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.reference import OUTPUT, load_reference
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.verification.reference import save_reference
from quest_deploy.verification.selection import (
    Structure,
    choose,
    record_bytes,
    sample_of,
    structure,
)
from tests.helpers import refused


@pytest.fixture(scope="module")
def found(mini_quantized: QuantizedModel, mini_trajectories: Trajectories) -> Structure:
    return structure(
        mini_quantized, mini_trajectories.inputs(torch.tensor([0, 3]), torch.tensor([1, 2]))
    )


def test_what_torch_says_is_upstream_is_what_the_graph_says(
    found: Structure, mini_proto: onnx.ModelProto
) -> None:
    graph = ir.from_proto(mini_proto)
    info = graph_info(graph)
    layers = {layer.output: layer.name for layer in info.layers.values()}
    (output,) = (str(value.name) for value in graph.graph.outputs)
    ends = {name: quantizer.input for name, quantizer in info.quantizers.items()} | {OUTPUT: output}
    reads = upstream(graph, info, ends.values())
    assert found.upstream == {
        name: {layers[x] for x in reads[value] if x in layers} for name, value in ends.items()
    }
    assert max(len(names) for names in found.upstream.values()) > 3


def test_reading_the_structure_leaves_the_model_as_it_was(
    found: Structure, mini_quantized: QuantizedModel, mini_trajectories: Trajectories
) -> None:
    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in mini_quantized.modules()
        )

    before = hooks()
    assert (
        structure(mini_quantized, mini_trajectories.inputs(torch.tensor([0]), torch.tensor([0])))
        == found
    )
    assert hooks() == before
    assert mini_quantized.bucket_state.current is None


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6])
def test_no_record_exceeds_its_size_and_the_records_take_turns(
    mini_checkpoint: Checkpoint, found: Structure, share: float
) -> None:
    everything = record_bytes(
        mini_checkpoint, found, sample_of(mini_checkpoint, found, mini_checkpoint.quantizers)
    )
    samples = choose(mini_checkpoint, found, 10, int(share * everything))
    assert all(
        record_bytes(mini_checkpoint, found, sample) <= share * everything for sample in samples
    )
    times = [sum(name in sample.sites for sample in samples) for name in mini_checkpoint.quantizers]
    assert 1 <= min(times) < max(times)


def test_with_room_for_all_every_record_holds_all(
    mini_checkpoint: Checkpoint, found: Structure
) -> None:
    everything = sample_of(mini_checkpoint, found, mini_checkpoint.quantizers)
    assert (
        choose(mini_checkpoint, found, 3, record_bytes(mini_checkpoint, found, everything))
        == [everything] * 3
    )


def test_the_size_of_a_record_is_what_its_file_takes(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    found: Structure,
    tmp_path: Path,
) -> None:
    save_reference(mini_quantized, mini_trajectories, tmp_path)
    for record in load_reference(tmp_path)[0]:
        sample = sample_of(mini_quantized.checkpoint, found, record.entry.sites)
        with safe_open(tmp_path / record.entry.file, framework="numpy") as file:
            counted = [
                name
                for name in file.keys()  # noqa: SIM118 - no mapping
                if name.startswith(("site.", "layer.", "operand."))
            ]
            size = sum(
                file.get_tensor(name).nbytes
                for name in counted
                if not name.endswith((".ties", ".untied"))
            )
        assert record_bytes(mini_quantized.checkpoint, found, sample) == size


def test_a_size_that_no_quantizer_fits_is_an_input_error(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quest_deploy.verification.reference.MEGABYTE", 1)
    with refused(10, "--megabytes"):
        save_reference(mini_quantized, mini_trajectories, tmp_path, megabytes=10)
