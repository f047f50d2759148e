from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import GRAPH
from quest_deploy.calibration.ptq import CalibrationOptions, RangeMethod, calibrate
from quest_deploy.calibration.trajectories import Trajectories, record_trajectories
from quest_deploy.models.loading import load_model, resolve_source
from scripts.bench import export_shapes as script

NO_TABLES: dict[str, Any] = dict.fromkeys(("scale", "low", "high", "channel"))


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])
def test_what_is_planned_without_values_is_what_calibration_plans(
    name: str, pipelines: Callable[[str], Path]
) -> None:
    model = load_model(resolve_source(str(pipelines(name)), random_weights=True))
    scheme = Scheme.parse("w4a4", edges=(500.0,), float_layers=model.float_layers)
    found = script.shape_checkpoint(model, scheme, script.example_of(model))
    network = model.load_unet()
    recorded: Trajectories = record_trajectories(
        model, network, steps=2, samples=1, seed=0, guidance=1.0, scheme=scheme
    )
    made = calibrate(name, network, recorded, scheme, CalibrationOptions(RangeMethod.MINMAX))
    assert [*found.layers] == [*made.layers]
    assert [*found.quantizers] == [*made.quantizers]
    assert {k: x.shape for k, x in found.floats.items()} == {
        k: x.shape for k, x in made.floats.items()
    }
    for key, layer in made.layers.items():
        planned = found.layers[key]
        assert (planned.weight_bits, planned.macs, planned.conv) == (
            layer.weight_bits,
            layer.macs,
            layer.conv,
        )
        assert planned.codes.shape == layer.codes.shape
        assert (planned.bias is None) == (layer.bias is None)
    for key, quantizer in made.quantizers.items():
        like = found.quantizers[key]
        assert isinstance(quantizer, ActivationQuantizerData)
        assert isinstance(like, ActivationQuantizerData)
        assert like.channel.shape == quantizer.channel.shape
        assert replace(like, **NO_TABLES) == replace(quantizer, **NO_TABLES)


def test_a_graph_of_shapes_is_checked_and_has_all_of_its_data(
    pipelines: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = pipelines("flux"), tmp_path / "graph"
    script.main(str(source), target, "w4a4", 4, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    graph = onnx.load(target / GRAPH, load_external_data=False).graph
    assert found["nodes"] == len(graph.node)
    (output,) = graph.output
    sizes = [x.dim_param or x.dim_value for x in output.type.tensor_type.shape.dim]
    assert sizes[0] == "batch"
    assert sizes[2:] == ["height", "width"]
    assert found["bytes"] == sum(x.stat().st_size for x in target.iterdir())
    network = load_model(resolve_source(str(source), random_weights=True)).load_unet()
    weights = sum(x.numel() for x in network.parameters())
    biases = found["quantized_weights"] + found["float_weights"]
    assert biases < weights < 1.1 * biases
