"""The command: what is measured, kept and written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from quest_deploy.errors import InputError, QuestDeployError
from scripts.bench.image import __main__ as command
from scripts.bench.image import prepare
from scripts.bench.image.report import answer, page
from scripts.bench.image.rows import AVX2, ROWS, VNNI, drawing, rows_of
from scripts.bench.image.runner import MissingError
from tests.helpers import refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from scripts.bench.image.rows import Row

OURS, EXACT, NNCF, TORCH = "ours-w4a4-attention8", "ours-w8a8", "nncf-int8", "torch"


LIMIT = {
    "step_s": 3.0,
    "layers_s": 1.5,
    "attention_s": 1.0,
    "other_s": 0.5,
    "peak": 5e11,
    "attention_at_peak_s": 0.5,
    "limit_s": 2.0,
}


def figures(image: float, error: float | None, **changed: Any) -> dict[str, Any]:
    found = {
        "open_s": 3.0,
        "first_image_s": image + 4,
        "text_encoder_s": 0.1,
        "unet_step_s": image / 20,
        "unet_s": image,
        "vae_s": 5.0,
        "image_s": image,
        "peak_bytes": 2**31,
        "bytes": 500_000_000,
        "error": error,
        "versions": {"torch": "2.13.0"},
    }
    return {**found, **changed}


def machine(**rows: dict[str, Any]) -> dict[str, Any]:
    size = prepare.SIZES["full"]
    definition = {"size": "full", "buckets": size.buckets, **drawing(size, 2)}
    entries = {
        name if "-" in name else name.replace("_", "-"): {
            "definition": definition,
            "date": "2026-11-30",
            **found,
        }
        for name, found in rows.items()
    }
    return {"processor": "a CPU", "instructions": "vnni", "rows": entries, "quality": {}}


def measured(**rows: dict[str, Any]) -> dict[str, Any]:
    return machine(**{name: {"figures": found} for name, found in rows.items()})


class Killed(BaseException):
    """The command ends in the midst of a row."""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the command with ``measure``; return the figures that it kept."""
    monkeypatch.setattr(command, "kind_of_machine", lambda: "vnni")
    monkeypatch.setattr(command, "limit_of", lambda workspace: LIMIT)
    monkeypatch.setattr(command.Prepared, "workspace", lambda self, form: self.folder / form.name)
    monkeypatch.setattr(
        command, "quality_of", lambda folder, form, threads, images: {"psnr": 30.5, "ssim": 0.91}
    )

    def run(measure: Callable[..., dict[str, Any]], *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(command, "measure", measure)
        folders = ("--folder", "made", "--results", "results", "--docs", "docs", "--peers", "peers")
        paths = [x if x.startswith("--") else str(tmp_path / x) for x in folders]
        try:
            command.app(args=[*paths, *arguments], standalone_mode=False)
        finally:
            kept = tmp_path / "results" / "image-vnni.json"
            found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        return found

    return run


def noting(names: list[str]) -> Callable[..., dict[str, Any]]:
    def measure(row: Row, *rest: Any) -> dict[str, Any]:
        names.append(row.name)
        return figures(40, 0.1)

    return measure


def test_a_row_that_is_measured_is_not_measured_again(bench: Any) -> None:
    names: list[str] = []
    bench(noting(names), "--only", "nncf-*")
    assert names == ["nncf-int8", "nncf-hybrid", "nncf-int8-bf16", "nncf-hybrid-bf16"]
    bench(noting(names))
    assert sorted(names) == sorted(row.name for row in rows_of(VNNI))
    names.clear()
    bench(noting(names), "--again", TORCH)
    assert names == [TORCH]


def test_a_row_that_was_interrupted_is_measured_again_and_the_others_are_kept(bench: Any) -> None:
    names: list[str] = []

    def interrupted(row: Row, *rest: Any) -> dict[str, Any]:
        if row.name == NNCF:
            raise Killed
        return noting(names)(row)

    with pytest.raises(Killed):
        bench(interrupted, "--only", "openvino-fp32", "--only", NNCF)
    bench(noting(names), "--only", "openvino-fp32", "--only", NNCF)
    assert names == ["openvino-fp32", NNCF]


def test_other_threads_and_another_processor_are_measured_anew(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    bench(noting(names), "--only", TORCH, "--only", NNCF)
    names.clear()
    kept = bench(noting(names), "--only", TORCH, "--threads", "1")
    assert names == [TORCH]
    assert kept["rows"].keys() == {TORCH}  # NNCF's had two
    bench(noting(names), "--only", NNCF)
    monkeypatch.setattr(command, "processor_name", lambda: "another CPU")
    kept = bench(noting(names), "--only", TORCH)
    assert kept["rows"].keys() == {TORCH}
    assert kept["processor"] == "another CPU"


def test_a_row_without_its_program_says_why_and_one_that_failed_fails_the_command(
    bench: Any, tmp_path: Path
) -> None:
    def measure(row: Row, *rest: Any) -> dict[str, Any]:
        if row.name == "sdcpp-q8_0":
            raise MissingError("no compiler was found")
        if row.name == NNCF:
            raise QuestDeployError("worker: a defect\nTraceback\nKeyError: 'x'")
        return figures(40, 0.1)

    bench(measure, "--only", "sdcpp-q8_0", "--only", TORCH)
    with refused("1 rows failed", NNCF, "a defect", "KeyError", error=QuestDeployError):
        bench(measure, "--only", NNCF)
    text = (tmp_path / "docs" / "image.md").read_text()
    assert "no compiler was found" in text
    assert "a defect" in text
    again: list[str] = []
    bench(noting(again), "--only", "sdcpp-q8_0", "--only", NNCF, "--only", TORCH)
    assert again == [NNCF, "sdcpp-q8_0"]


def test_images_of_the_embedded_model_are_compared_once_for_each_form(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: list[str] = []

    def quality(folder: Path, form: str, threads: int, images: int) -> dict[str, Any]:
        forms.append(form)
        return {"psnr": 30.5, "ssim": 0.91}

    monkeypatch.setattr(command, "quality_of", quality)
    bench(noting([]), "--only", "nncf-int8-bf16", "--only", "openvino-genai-int8", "--only", TORCH)
    bench(noting([]), "--only", "nncf-int8-bf16", "--only", OURS)
    assert forms == ["int8-bf16", "w4a4-attention8"]
    bench(noting([]), "--only", OURS, "--threads", "1")
    assert forms[2:] == ["w4a4-attention8"]


def test_an_unknown_size_or_row_is_refused(bench: Any) -> None:
    with refused("--size", "small", "full", "huge"):
        bench(noting([]), "--size", "huge")
    for option in ("--only", "--again"):
        with refused("nncf-int9"):
            bench(noting([]), option, "nncf-int9")
    assert InputError.exit_code == 2


def test_every_row_has_a_line_of_figures_or_a_reason_why_not() -> None:
    found = measured(torch=figures(200, 0.0), nncf_int8=figures(45, 0.0625))
    found["rows"]["sdcpp-q8_0"] = {"reason": "no compiler was found"}
    found["quality"] = {"int8": {"psnr": 31.25, "ssim": 0.953}}
    text = page([found])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "| " in line}
    assert {row.label for row in rows_of(VNNI)} & {*lines} == {"torch, FP32, eager", "NNCF, INT8"}
    assert "W7A8" not in text
    assert (
        "| 49.00 | 0.10 | 2.25 | 45.00 | 5.00 | 45.00 | 2.00 | 500 | 6.2e-02 | 31.2 | 0.953 |"
        in (lines["NNCF, INT8"])
    )
    assert "- Not measured: stable-diffusion.cpp, Q8_0: no compiler was found." in text
    (others,) = (line for line in text.splitlines() if line.endswith(": not run yet."))
    assert len(others.split(";")) == len(rows_of(VNNI)) - 3


def test_the_answer_is_our_fastest_of_8_bits_and_our_fastest_of_no_larger_error() -> None:
    found = measured(
        ours_w4a4_attention8=figures(20, 0.8),
        ours_w8a8=figures(40, 0.05, peak_bytes=2**30),
        ours_w8a8_attention8=figures(30, 0.07),
        nncf_int8=figures(44, 0.06),
    )
    first, _, line = answer(found)
    assert "W8A8, attention at 8 bits" in first
    assert "W8A8, attention at 8 bits is ahead of it, 1.47x as fast with 1.00x its memory" in line
    assert (
        "at no larger error, W8A8, float attention is ahead of it, 1.10x as fast with 0.50x its "
        "memory" in line
    )


def test_weights_of_7_bits_are_among_our_8_bits_on_machines_without_vnni() -> None:
    without = measured(
        ours_w7a8=figures(30, 0.07), ours_w8a8=figures(40, 0.05), torch=figures(90, 0.0)
    )
    assert "W7A8, float attention" in answer({**without, "instructions": AVX2})[0]
    assert "W8A8, float attention" in answer({**without, "instructions": VNNI})[0]


def test_the_answer_says_where_ours_is_behind_or_errs_more() -> None:
    ours = {"ours_w8a8_attention8": figures(50, 0.8), "ours_w8a8": figures(60, 0.05)}
    behind = answer(measured(**ours, nncf_int8=figures(40, 0.04)))[-1]
    assert "W8A8, attention at 8 bits is behind it, 0.80x as fast" in behind
    assert "none of ours errs as little" in behind
    unknown = answer(measured(**ours, **{"sdcpp-q8_0": figures(400, None)}))[-1]
    assert "8.00x as fast" in unknown
    assert "errs" not in unknown
    assert "errors are not compared" in unknown
    same = answer(measured(**ours, nncf_int8=figures(51, 0.9)))[-1]
    assert "is as fast, 1.02x" in same
    (alone,) = answer(measured(ours_w8a8=figures(60, 0.05)))
    assert alone == "Nothing to compare yet."


def test_a_step_of_ours_stands_beside_its_limit_which_is_measured_once(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def limit(workspace: Path) -> dict[str, float]:
        asked.append(workspace.name)
        return LIMIT

    monkeypatch.setattr(command, "limit_of", limit)
    for _ in range(2):
        bench(noting([]), "--only", EXACT, "--only", NNCF)
    assert asked == ["w8a8"]
    line = "| W8A8, float attention | 3.00 | 1.50 | 1.00 | 0.50 | 0.50 | 2.00 | 0.50 | 1.50x |"
    assert line in (tmp_path / "docs" / "image.md").read_text()


def test_a_machine_without_figures_has_a_page() -> None:
    assert "Nothing is measured yet." in page([machine()])


def test_rows_are_told_apart_and_every_worker_is_a_module() -> None:
    assert len({row.name for row in ROWS}) == len({row.label for row in ROWS}) == len(ROWS)
    folder = prepare.ROOT / "scripts" / "bench" / "image" / "workers"
    assert all((folder / f"{row.worker}.py").is_file() for row in ROWS)
    assert replace(ROWS[0], worker="genai").ours is False
