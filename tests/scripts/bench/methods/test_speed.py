from __future__ import annotations

from pathlib import Path

import pytest

from quest_deploy.files import read_json, write_json
from scripts.bench.methods import speed
from scripts.bench.methods.cells import MAIN_BITS


@pytest.mark.slow
def test_both_backends_engines_are_timed_beside_fp32(mini_emoji: None, tmp_path: Path) -> None:
    found = speed.measure("w4a4", tmp_path / "workspace", runs=1, threads=1)
    assert set(found) == {"openvino", "onnxruntime"}
    for figures in found.values():
        assert set(figures["speedup_over_fp32"]) == {"2", "16"}
        assert all(ratio > 0 for ratio in figures["speedup_over_fp32"].values())
        assert 0 < figures["engine_bytes"] < figures["fp32_bytes"]


def test_what_is_measured_is_not_measured_again_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(bits: str, folder: Path, *, runs: int, threads: int) -> dict[str, int]:
        measured.append(bits)
        return {"threads": threads}

    monkeypatch.setattr(speed, "measure", measure)
    path = tmp_path / "speed.json"
    assert speed.load_speeds(path) is None
    speed.main(runs=1, threads=3, path=path)
    assert speed.load_speeds(path) == read_json(path)
    assert read_json(path)["bits"] == {bits: {"threads": 3} for bits in MAIN_BITS}
    write_json(path, {})
    speed.main(path=path)
    assert (measured, read_json(path)) == ([*MAIN_BITS], {})
    speed.main(again=True, path=path)
    assert measured == [*MAIN_BITS, *MAIN_BITS]
