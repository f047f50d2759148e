from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.finetuning.teacher_cache import TargetStream

STEP_BYTES = 4 * (2 * 3 + 5) + 4
"""Of a step's tensors, [2, 3] and [5], and its checksum."""


def targets(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2, 3, generator=generator), torch.randn(5, generator=generator)]


def write(stream: TargetStream, first: int, end: int) -> list[int]:
    """Write, and tell which steps were computed."""
    written: list[int] = []
    stream.write(first, end, targets, written.append)
    return written


def assert_holds(stream: TargetStream, step: int) -> None:
    found = stream.read(step)
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, targets(step), strict=True))


def test_every_step_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)
    assert write(stream, 3, 7) == [3, 4, 5, 6]
    for step in (6, 3, 5, 4):
        assert_holds(stream, step)
    assert stream.read(2) is None
    assert stream.read(7) is None


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_file_takes_as_many_steps_as_the_budget_allows_and_at_least_one(
    tmp_path: Path, steps: int
) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)
    write(stream, 0, 1)
    header = stream.path.stat().st_size - STEP_BYTES
    for budget in (header + steps * STEP_BYTES, header + (steps + 1) * STEP_BYTES - 1):
        assert write(TargetStream(stream.path, "key", budget), 0, 9) == list(range(steps))
    assert write(TargetStream(stream.path, "key", 0), 4, 9) == [4]


def test_targets_of_low_precision_are_stored_in_float32(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 0)
    stream.write(0, 1, lambda step: [torch.tensor([1.5], dtype=torch.bfloat16)], lambda step: None)
    found = stream.read(0)
    assert found is not None
    assert found[0].dtype is torch.float32
    assert found[0].item() == 1.5


def test_another_key_reads_nothing(tmp_path: Path) -> None:
    write(TargetStream(tmp_path / "targets.bin", "key", 10**6), 0, 2)
    assert TargetStream(tmp_path / "targets.bin", "another", 10**6).read(0) is None


def test_a_new_run_of_steps_replaces_the_old_one(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)
    write(stream, 0, 4)
    write(stream, 4, 6)
    assert stream.read(0) is None
    assert_holds(stream, 5)


def test_a_truncated_file_gives_its_whole_steps_only(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)
    write(stream, 0, 3)
    content = stream.path.read_bytes()
    for cut in range(1, STEP_BYTES, 7):
        stream.path.write_bytes(content[:-cut])
        assert stream.read(2) is None
        assert_holds(stream, 1)
    stream.path.write_bytes(content[:9])
    assert stream.read(0) is None


def test_every_changed_byte_of_a_step_is_noticed(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)
    write(stream, 0, 2)
    content = stream.path.read_bytes()
    for position in range(len(content) - STEP_BYTES, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        stream.path.write_bytes(damaged)
        assert stream.read(1) is None
        assert_holds(stream, 0)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n", b"[1]\n", b'{"key": "key", "first": 0}\n', b"\xff\xfe" * 100]
)
def test_a_file_of_something_else_is_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "targets.bin").write_bytes(content)
    assert TargetStream(tmp_path / "targets.bin", "key", 10**6).read(0) is None


def test_there_may_be_no_file(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)
    assert stream.read(0) is None
    stream.remove()


def test_an_interrupted_write_keeps_the_finished_steps(tmp_path: Path) -> None:
    stream = TargetStream(tmp_path / "targets.bin", "key", 10**6)

    def interrupt(step: int) -> list[Tensor]:
        if step == 2:
            raise KeyboardInterrupt
        return targets(step)

    with pytest.raises(KeyboardInterrupt):
        stream.write(0, 4, interrupt, lambda step: None)
    assert_holds(stream, 1)
    assert stream.read(2) is None
