from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quest_deploy.artifacts.checkpoint import Checkpoint
from quest_deploy.artifacts.reference import (
    INDEX,
    TABLES,
    Record,
    RecordEntry,
    ReferenceIndex,
    load_reference,
)
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.calibration.trajectories import Trajectories
from quest_deploy.quantization.model import QuantizedModel
from quest_deploy.verification.reference import (
    _sensitivity,
    highest_timestep,
    is_tie,
    lowest_timestep,
    save_reference,
)
from tests.helpers import along, numpy_layer, of_sample, quantizer_codes, refused, relative_error
from tests.quest_deploy.support import flip_byte, truncate


@pytest.fixture(scope="module")
def records(mini_reference: Path) -> list[Record]:
    return load_reference(mini_reference)[0]


@pytest.mark.parametrize("buckets", [1, 2, 3, 6])
def test_every_bucket_is_covered_at_its_lowest_or_highest_timestep(
    mini_checkpoints: Callable[[int], Checkpoint],
    mini_trajectories: Trajectories,
    tmp_path: Path,
    buckets: int,
) -> None:
    checkpoint = mini_checkpoints(buckets)
    save_reference(QuantizedModel.from_checkpoint(checkpoint).eval(), mini_trajectories, tmp_path)
    covered = set()
    for record in load_reference(tmp_path)[0]:
        assert record.bucket.tolist() == [*record.entry.buckets] * 2
        assert record.inputs["timestep"].tolist() == pytest.approx(list(record.entry.timesteps))
        for bucket, timestep in zip(
            record.entry.buckets, record.inputs["timestep"].tolist(), strict=True
        ):
            assert checkpoint.scheme.bucket_of(timestep) == bucket
            covered.add(bucket)
    assert covered == set(range(buckets))


@given(buckets=st.integers(1, 1000), data=st.data())
def test_the_lowest_and_the_highest_timestep_lie_in_their_bucket(
    buckets: int, data: st.DataObject
) -> None:
    scheme = Scheme.parse("w4a4", buckets=buckets)
    bucket = data.draw(st.integers(0, buckets - 1))
    low, high = (float(np.float32(f(scheme, bucket))) for f in (lowest_timestep, highest_timestep))
    assert scheme.bucket_of(low) == scheme.bucket_of(high) == bucket
    assert low <= high
    assert scheme.bucket_of(np.nextafter(np.float32(low), np.float32(-1))) < bucket or bucket == 0


def test_a_bucket_narrower_than_a_step_has_a_highest_timestep_too() -> None:
    scheme = Scheme(4, 4, (500.0, 500.5))
    assert scheme.bucket_of(highest_timestep(scheme, 1)) == 1


def test_outputs_are_those_of_the_fake_quantized_model(
    records: list[Record], mini_quantized: QuantizedModel
) -> None:
    for record in records:
        inputs = {name: torch.from_numpy(value) for name, value in record.inputs.items()}
        with torch.no_grad():
            output = mini_quantized(**inputs)
        np.testing.assert_allclose(record.tensors["output"], output.numpy(), rtol=1e-5, atol=1e-6)


def test_codes_are_those_of_the_ops_specification(
    records: list[Record], mini_checkpoint: Checkpoint
) -> None:
    for record in records:
        for name, quantizer in mini_checkpoint.quantizers.items():
            expected = quantizer_codes(
                quantizer, record.tensors[f"site.{name}.x"], record.tensors["bucket"]
            )
            np.testing.assert_array_equal(
                record.tensors[f"site.{name}.codes"], expected, err_msg=name
            )


def test_layer_outputs_are_the_integer_layers_of_the_untied_activations(
    records: list[Record], mini_checkpoint: Checkpoint
) -> None:
    for record in records:
        for name in mini_checkpoint.layers:
            quantizer = mini_checkpoint.quantizer_of(name)
            expected = numpy_layer(
                mini_checkpoint, name, record.untied(quantizer.name), record.tensors["bucket"]
            )
            assert relative_error(record.tensors[f"layer.{name}.y"], expected) < 1e-5, name


def test_rounding_before_each_quantizer_and_the_output_is_what_last_bits_change(
    records: list[Record], mini_checkpoint: Checkpoint
) -> None:
    last_bit = 2.0**-24
    for record in records:
        rounding = {
            name: record.tensors[f"rounding.{name}"]
            for name in (*mini_checkpoint.quantizers, "output")
        }
        phases = record.tensors["input.timestep"] * last_bit
        assert np.all(rounding.pop("time_embedding.linear_1") <= 20 * (phases + last_bit))
        for name, value in rounding.items():
            assert value.shape == (2,)
            assert value.min() > last_bit / 10, name
            assert value.max() < 100 * last_bit, name
        assert rounding["conv_in"].max() < 2 * last_bit


def ratio(checkpoint: Checkpoint, quantizer: str, x: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    entry = checkpoint.quantizers[quantizer]
    return x / (of_sample(entry.scale, bucket, x.ndim) * along(entry.channel, entry.axis, x.ndim))


def test_untied_activations_are_far_from_every_tie_and_keep_the_others(
    records: list[Record], mini_checkpoint: Checkpoint
) -> None:
    for record in records:
        for name in mini_checkpoint.quantizers:
            x, bucket = record.tensors[f"site.{name}.x"], record.tensors["bucket"]
            untied = record.untied(name)
            assert not is_tie(
                torch.from_numpy(ratio(mini_checkpoint, name, untied, bucket))
            ).any(), name
            moved = untied != x
            assert is_tie(torch.from_numpy(ratio(mini_checkpoint, name, x, bucket)))[
                torch.from_numpy(moved)
            ].all(), name


def test_every_probe_goes_beyond_both_clip_bounds_of_its_bucket(
    records: list[Record], mini_checkpoint: Checkpoint
) -> None:
    missed = []
    for record in records:
        for name, quantizer in mini_checkpoint.quantizers.items():
            reached = np.rint(
                ratio(
                    mini_checkpoint,
                    name,
                    record.tensors[f"site.{name}.x"],
                    record.tensors["bucket"],
                )
            )
            for row, bucket in list(enumerate(record.bucket.tolist()))[2:]:
                if (
                    reached[row].min() >= quantizer.low[bucket]
                    or reached[row].max() <= quantizer.high[bucket]
                ):
                    missed.append((name, bucket))
    assert missed == []


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(-8, 8)), min_size=1, max_size=50))
def test_a_tie_is_what_lies_at_most_four_ulp_from_halfway_on_either_side_of_zero(
    near: list[tuple[int, int]],
) -> None:
    values = np.asarray([n + 0.5 for n, _ in near], np.float32)
    values = values + np.asarray([ulps for _, ulps in near], np.float32) * np.spacing(
        np.abs(values)
    )
    expected = [abs(ulps) <= 4 for _, ulps in near]
    for signed in (values, -values):
        assert is_tie(torch.from_numpy(signed)).tolist() == expected


def test_the_sensitivity_is_that_of_last_bit_differences(records: list[Record]) -> None:
    sensitivities = np.asarray([record.entry.sensitivity for record in records])
    assert (sensitivities > 0).all()
    assert np.isfinite(sensitivities).all()


class Rounding(torch.nn.Module):
    """A quantizer of step 1."""

    def ratio(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)


class HangsOnOneCode(torch.nn.Module):
    """A model whose outputs all are the code of the first value."""

    def __init__(self) -> None:
        super().__init__()
        self.site = Rounding()
        self.sites = [self.site]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)[:, :1] * torch.ones(4, dtype=x.dtype)


@pytest.mark.parametrize(("ulps", "met"), [(100, True), (-100, True), (200, False)])
def test_the_sensitivity_meets_the_one_code_that_all_hangs_on_where_it_lies_near_a_tie(
    ulps: int, *, met: bool
) -> None:
    first = 1.5 * (1 + ulps * torch.finfo(torch.float32).eps)
    x = torch.cat([torch.tensor([[first], [first]]), torch.rand(2, 1000)], 1)
    model: Any = HangsOnOneCode()
    changed = _sensitivity(model, {"x": x}, model(x), 0)
    assert (min(changed) > 0.3) is met


@pytest.mark.parametrize(
    ("measured", "where"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])]
)
def test_the_sensitivity_is_measured_from_the_first_record_to_the_last(
    mini_checkpoints: Callable[[int], Checkpoint],
    mini_trajectories: Trajectories,
    tmp_path: Path,
    measured: int,
    where: list[int],
) -> None:
    model = QuantizedModel.from_checkpoint(mini_checkpoints(6)).eval()
    entries = save_reference(model, mini_trajectories, tmp_path, measured=measured)
    assert [i for i, entry in enumerate(entries) if entry.sensitivity is not None] == where
    assert [entry.sensitivity is None for entry in entries] == [
        entry.half_sensitivity is None for entry in entries
    ]


def test_the_same_seed_saves_the_same_reference(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    mini_reference: Path,
    tmp_path: Path,
) -> None:
    save_reference(mini_quantized, mini_trajectories, tmp_path)
    for record, again in zip(
        load_reference(mini_reference)[0], load_reference(tmp_path)[0], strict=True
    ):
        assert record.entry == again.entry
        assert all(
            np.array_equal(value, again.tensors[name]) for name, value in record.tensors.items()
        )


class Interruption(Exception):
    """Stands for Ctrl-C."""


def record_one(model: QuantizedModel, trajectories: Trajectories, folder: Path, key: str) -> Path:
    """Interrupt a reference after its first record, whose file is returned."""

    def interrupt(phase: str, done: int, total: int) -> None:
        assert total > 1
        raise Interruption

    with pytest.raises(Interruption):
        save_reference(model, trajectories, folder, key=key, progress=interrupt)
    (made,) = folder.glob("buckets-*")
    return made


@pytest.mark.parametrize(
    ("key", "damage", "kept"),
    [
        ("key", lambda folder: None, True),
        ("another", lambda folder: None, False),
        ("key", lambda folder: truncate(next(folder.glob("buckets-*"))), False),
        ("key", lambda folder: flip_byte(next(folder.glob("buckets-*"))), False),
        ("key", lambda folder: next(folder.glob("buckets-*")).unlink(), False),
        ("key", lambda folder: truncate(folder / INDEX), False),
        ("key", lambda folder: (folder / INDEX).write_text("[]"), False),
    ],
)
def test_a_record_that_is_whole_and_of_the_same_key_is_not_made_again_and_the_reference_is_the_same(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    mini_reference: Path,
    tmp_path: Path,
    key: str,
    damage: Callable[[Path], object],
    kept: bool,
) -> None:
    made = record_one(mini_quantized, mini_trajectories, tmp_path, "key")
    damage(tmp_path)
    before = made.stat().st_mtime_ns if made.exists() else None
    save_reference(mini_quantized, mini_trajectories, tmp_path, key=key)
    assert (made.stat().st_mtime_ns == before) == kept
    for record, again in zip(
        load_reference(mini_reference)[0], load_reference(tmp_path)[0], strict=True
    ):
        assert record.entry == again.entry
        assert all(
            np.array_equal(value, again.tensors[name]) for name, value in record.tensors.items()
        )


def test_a_record_that_another_key_overwrote_is_not_kept_for_the_first(
    mini_quantized: QuantizedModel,
    mini_trajectories: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = record_one(mini_quantized, mini_trajectories, tmp_path, "first")
    with monkeypatch.context() as patch:
        patch.setattr(
            "quest_deploy.verification.reference.sha256_of",
            lambda path: (_ for _ in ()).throw(Interruption),
        )
        with pytest.raises(Interruption):
            save_reference(mini_quantized, mini_trajectories, tmp_path, seed=1, key="second")
    before = made.stat().st_mtime_ns
    save_reference(mini_quantized, mini_trajectories, tmp_path, key="first")
    assert made.stat().st_mtime_ns != before


def test_its_files_may_be_read_by_whom_the_umask_lets(mini_reference: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in mini_reference.iterdir()}
    assert set(modes.values()) == {modes[INDEX]}, modes


def test_the_reference_comes_from_torch_and_never_from_the_exported_graph() -> None:
    program = (
        "import sys, quest_deploy.verification.reference\nprint([m for m in sys.modules if "
        "m.split('.')[0] in ('exporters', 'onnx', 'onnx_ir')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / INDEX).write_text("{}"),
        lambda folder: (folder / INDEX).write_text('{"records": [{"file": "a"}]}'),
        lambda folder: (folder / INDEX).write_text('{"records": ['),
        lambda folder: (folder / INDEX).unlink(),
        lambda folder: (folder / TABLES).unlink(),
        lambda folder: truncate(next(folder.glob("buckets-*"))),
        lambda folder: truncate(folder / TABLES),
    ],
)
def test_a_damaged_reference_is_an_input_error(
    mini_reference: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    for path in mini_reference.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with refused(tmp_path, "quest-deploy reference"):
        load_reference(tmp_path)


def test_samples_can_be_cut_down_to_a_size_that_the_model_takes(
    mini_quantized: QuantizedModel, mini_trajectories: Trajectories, tmp_path: Path
) -> None:
    save_reference(mini_quantized, mini_trajectories, tmp_path, sample_size=(2, 4))
    records, _ = load_reference(tmp_path)
    assert {record.tensors["input.sample"].shape[2:] for record in records} == {(2, 4)}
    assert {record.tensors["output"].shape[2:] for record in records} == {(2, 4)}


@pytest.mark.parametrize("size", [(3, 4), (4, 0), (4, 1024)])
def test_a_size_that_the_model_cannot_take_or_that_was_not_recorded_is_refused(
    small_checkpoint: Checkpoint,
    small_trajectories: Trajectories,
    tmp_path: Path,
    size: tuple[int, int],
) -> None:
    model = QuantizedModel.from_checkpoint(small_checkpoint).eval()
    with refused("--sample-size", 2, "{}x{}".format(*size)):
        save_reference(model, small_trajectories, tmp_path, sample_size=size)


@pytest.mark.parametrize("sensitivity", [9.9, float("nan"), -0.1])
def test_an_edited_sensitivity_never_becomes_a_tolerance(
    mini_reference: Path, tmp_path: Path, sensitivity: float
) -> None:
    index = json.loads((mini_reference / INDEX).read_text())
    index["records"][0]["sensitivity"][0] = sensitivity
    (tmp_path / INDEX).write_text(json.dumps(index))
    with refused(tmp_path / INDEX):
        ReferenceIndex.read(tmp_path)
    with refused("sensitivity.0"):
        RecordEntry("a", (1.0, 2.0), (0, 1), (sensitivity, 0.1), None, (), ())
