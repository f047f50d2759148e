from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import numpy as np
import onnx
import pytest

from quest_deploy.artifacts.checkpoint import ActivationQuantizerData, Checkpoint
from scripts.bench import measure_export as script


@pytest.mark.parametrize("buckets", [8, 50])
def test_each_of_more_buckets_has_the_tables_of_the_old_bucket_at_its_middle(
    small_checkpoint: Checkpoint, buckets: int
) -> None:
    wider = script.with_buckets(small_checkpoint, buckets)
    assert wider.scheme.buckets == buckets
    middles = (np.arange(buckets) + 0.5) * small_checkpoint.scheme.train_timesteps / buckets
    old = [small_checkpoint.scheme.bucket_of(float(t)) for t in middles]
    assert len(set(old)) == 4
    assert [wider.scheme.bucket_of(float(t)) for t in middles] == list(range(buckets))
    for name, quantizer in small_checkpoint.quantizers.items():
        found = wider.quantizers[name]
        assert isinstance(quantizer, ActivationQuantizerData)
        for table in ("scale", "low", "high"):
            np.testing.assert_array_equal(
                getattr(found, table), getattr(quantizer, table)[old], err_msg=name
            )


def test_ratios_are_of_medians_and_count_the_plain_exports_call_alone() -> None:
    def cost(seconds: float, size: int, nodes: int, **call: Any) -> Any:
        return script.Cost(seconds, 2 * seconds, seconds / 10, size, nodes, **call)

    plain = [
        cost(x, 1000, 10, call_seconds=x - 10, call_cpu_seconds=2 * x - 16)
        for x in (20.0, 60.0, 30.0)
    ]
    ours = [cost(x, 250, 30) for x in (40.0, 30.0, 90.0)]
    ratios = {
        "seconds_ratio": 40 / 20,
        "cpu_seconds_ratio": 80 / 44,
        "process_seconds_ratio": 40 / 30,
        "process_cpu_seconds_ratio": 80 / 60,
        "peak_ratio": 4 / 3,
        "bytes_ratio": 0.25,
        "payload_ratio": 1.25,
        "exact_ratio": 1.0,
    }
    found = script.Comparison(plain, ours, 200, 250, 20)
    assert found.summary() == pytest.approx(ratios)
    found = script.Comparison(plain, ours, 200, 250, 20, cost(1.0, 500, 33), 50)
    wider = {"wider_bytes_ratio": 2, "wider_more_nodes": 3}
    assert found.summary() == pytest.approx(ratios | wider)


def test_the_payload_is_codes_at_their_bits_and_the_rest_in_sixteen(
    small_checkpoint: Checkpoint,
) -> None:
    bits = sum(8 * x.nbytes for x in small_checkpoint.floats.values()) // 2
    for layer in small_checkpoint.layers.values():
        bits += layer.weight_codes.size * layer.weight_bits
    assert script.payload_bytes(small_checkpoint) == bits // 8


def test_what_is_rounded_nowhere_takes_two_bytes_a_weight_only_where_those_hold_it(
    small_checkpoint: Checkpoint,
) -> None:
    weight = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    halves = weight.astype(np.float16).astype(np.float32)
    wide, narrow = (
        script.exact_bytes(
            replace(small_checkpoint, floats={**small_checkpoint.floats, "weight": x})
        )
        for x in (weight, halves)
    )
    assert wide - narrow == 2 * weight.size
    assert narrow - script.exact_bytes(small_checkpoint) == 2 * weight.size
    tables = [
        getattr(x, name)
        for x in small_checkpoint.quantizers.values()
        for name in ("scale", "low", "high", "channel")
    ]
    tables += [x for y in small_checkpoint.layers.values() for x in (y.weight_scale, y.bias)]
    held = sum(4 * x.size for x in tables if x is not None)
    floats = small_checkpoint.floats.values()
    wider = sum(2 * x.size for x in floats if not np.array_equal(x, np.asarray(x, np.float16)))
    expected = script.payload_bytes(small_checkpoint) + held + wider
    assert script.exact_bytes(small_checkpoint) == expected


def test_a_process_is_charged_its_own_time_memory_and_files(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] z) { y = Abs(x) z = '
        "Neg(y) }"
    )
    onnx.save(graph, tmp_path / "unet.onnx")
    (tmp_path / "unet.onnx.data").write_bytes(b"x" * 1000)
    (tmp_path / "other").write_bytes(b"x")
    code = (
        "import json, time; held = bytes(b'x' * 2**30)\n"
        "while time.process_time() < 0.3: pass\n"
        "print('noise'); print(json.dumps({'call_seconds': 1.5, 'call_cpu_seconds': 2.5}))"
    )
    cost = script.measured("ours", tmp_path, "-c", code)
    assert cost.peak_gib >= 1
    assert min(cost.seconds, cost.cpu_seconds) >= 0.3
    assert cost.bytes == 1000 + (tmp_path / "unet.onnx").stat().st_size
    assert (cost.nodes, cost.call_seconds, cost.call_cpu_seconds) == (2, 1.5, 2.5)
    with pytest.raises(CalledProcessError):
        script.measured("ours", tmp_path, "-c", "raise SystemExit(3)")
