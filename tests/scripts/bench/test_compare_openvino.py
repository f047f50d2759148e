from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporters.graph_info import SAMPLE_SHAPE_KEY, graph_info, save_graph
from exporters.lowering.onnxruntime import lower
from quest_deploy.backends.base import input_shapes
from scripts.bench import compare_openvino as script
from tests.helpers import graph_from_text, hand_checkpoint, hand_graph, run


def pair(rival: Any, engine: list[float], theirs: list[float], output: float) -> dict[Any, Any]:
    def timing(seconds: list[float], value: float) -> Any:
        return script.Timing(seconds, {"attention": min(seconds)}, np.full(4, value, np.float32))

    return {script.Variant.ENGINE: timing(engine, 1.1), rival: timing(theirs, output)}


def test_each_ratio_is_the_median_of_runs_beside_runs() -> None:
    fp32, nncf, static, _ = script.RIVALS
    pairs = {
        fp32: pair(fp32, [2, 2, 9], [8, 8, 8], 1.0),
        nncf: pair(
            nncf, [4, 4, 4], [5, 5, 1], 1.5
        ),  # a slower minute: both sides took twice as long
        static: pair(static, [1, 2, 3], [3, 2, 6], 1.1),  # the ratio of the medians would be 1.5
    }
    rows = {row.variant: row for row in script.rows_of("fp32", pairs, np.ones(4, np.float32))}
    assert rows["engine"].seconds == 3
    assert rows["engine"].speedup == pytest.approx(4)
    assert rows["nncf int8"].against_engine == pytest.approx(1.25)
    assert rows["nncf int8"].speedup == pytest.approx(3.2)
    assert rows["static scales"].against_engine == pytest.approx(2)
    assert [rows[name].error for name in ("fp32", "engine", "nncf int8")] == pytest.approx(
        [0, 0.1, 0.5]
    )
    assert rows["engine"].profile == {"attention": 1}  # the fastest run's


@pytest.mark.parametrize("buckets", [8, 20])
def test_more_buckets_hold_the_tables_of_the_buckets_that_they_divide(
    small_graph: ir.Model, buckets: int
) -> None:
    assert buckets % graph_info(small_graph).scheme.buckets == 0
    generator = np.random.default_rng(0)
    feeds = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in input_shapes(small_graph, 6).items()
    }
    feeds["timestep"] = np.linspace(0, 999, 6, dtype=np.float32)
    wider = script.with_buckets(small_graph.clone(), buckets)
    assert wider.graph.initializers["bucket_edges"].shape == (buckets - 1,)
    before, after = (run(lower(model), feeds)[0] for model in (small_graph, wider))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("node_type", "fused", "role"),
    [
        ("Convolution", "conv1.product", "convolution and linear"),
        ("FullyConnectedQuantizedLegacy", "to_q.product", "convolution and linear"),
        ("Subgraph", "attn1.scores.product,node_Softmax_3,attn1.mix.product", "attention"),
        ("Subgraph", "conv1.scaled,conv1.biased", "quantize and elementwise"),
        ("MVN", "", "norm"),
        ("Reorder", "", "layout"),
        ("Interpolate", "", "rest"),
    ],
)
def test_a_node_counts_for_what_it_computes(node_type: str, fused: str, role: str) -> None:
    assert script.role_of(node_type, fused) == role


@pytest.mark.parametrize(("side", "expected"), [(None, (6, 8)), (16, (16, 16))])
def test_inputs_have_the_size_asked_for_and_masks_leave_nothing_out(
    side: int | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    model = graph_from_text(
        "g (float[batch, 4, height, width] sample, float[batch] timestep, float[batch, 5] "
        "encoder_attention_mask) => (float[batch, 4, height, width] y) { y = Identity(sample) }"
    )
    model.metadata_props[SAMPLE_SHAPE_KEY] = "[4, 6, 8]"
    save_graph(model, tmp_path / "model.onnx")
    feeds = script.random_feeds(tmp_path / "model.onnx", 200, 0, side)
    assert feeds["sample"].shape == (200, 4, *expected)
    assert feeds["sample"].std() == pytest.approx(1, abs=0.1)
    assert 900 < np.ptp(feeds["timestep"]) < 1000
    np.testing.assert_array_equal(feeds["encoder_attention_mask"], np.ones((200, 5), np.float32))


def test_a_small_graph_is_compared_with_nncf_and_the_table_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_graph(hand_graph(hand_checkpoint()), tmp_path / "model.onnx")
    script.main(
        tmp_path / "model.onnx",
        batch=2,
        threads=1,
        dtype=["fp32"],
        runs=1,
        folder=tmp_path / "kept",
        json_file=tmp_path / "j",
    )
    result = json.loads((tmp_path / "j").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows.keys() == {"engine", "fp32", "nncf int8", "static scales", "50 buckets"}
    assert result["versions"].keys() == {"openvino", "nncf"}
    assert rows["fp32"]["error"] == 0
    assert 0 < rows["engine"]["error"] < 1
    assert (
        0 < rows["nncf int8"]["error"] < rows["engine"]["error"]
    )  # 8-bit activations in place of 4-bit ones
    assert all(row["seconds"] > 0 and row["profile"] for row in rows.values())
    assert "nncf int8" in capsys.readouterr().out
