"""The time of a whole image, by its parts: of pipelines that take known times, and of a real one."""

from __future__ import annotations

import os
import platform
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.backends.base import processor_name
from quest_deploy.evaluation import pipeline_benchmark
from quest_deploy.evaluation.pipeline_benchmark import draw_in_turn, timing_of
from quest_deploy.models.loading import load_model
from quest_deploy.stages import benchmark_pipeline
from quest_deploy.stages.options import BenchmarkOptions
from quest_deploy.stages.run import Run
from scripts.docs import results
from tests.helpers import refused
from tests.quest_deploy.evaluation.page_reader import Page
from tests.quest_deploy.support import Chain, cli


class Clock:
    """Seconds that pass when a part says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Part:
    """A part of a pipeline that takes ``seconds`` a call, more at each drawing."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def forward(self) -> None:
        self.clock.now += self.seconds

    decode = encode = forward


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pipeline_benchmark, "time", made)
    return made


def pipeline(clock: Clock, unet: float) -> Any:
    return SimpleNamespace(
        text_encoder=Part(clock, 1.0),
        text_encoder_2=None,
        unet=Part(clock, unet),
        vae=Part(clock, 4.0),
    )


def draw(made: Any) -> None:
    """Two calls of the text encoder, three of the UNet, one of the decoder; the rest takes 0.5."""
    made.text_encoder.forward()
    made.text_encoder.forward()
    for _ in range(3):
        made.unet.forward()
        made.unet.seconds += 1
    made.vae.decode()
    made.text_encoder.clock.now += 0.5


def test_the_parts_of_an_image_are_what_their_calls_take(clock: Clock) -> None:
    made = {"fp32": pipeline(clock, 10.0), "quantized": pipeline(clock, 1.0)}
    drawings = draw_in_turn(made, draw, 2)
    # The first drawing, of 1, 2 and 3 seconds, is not counted: 4, 5, 6 and 7, 8, 9 are.
    timing = timing_of("quantized", drawings["quantized"], 3, 77)
    assert timing.parts == {"text encoder": 2.0, "unet": (15 + 24) / 2, "decoder": 4.0}
    assert (timing.unet_call_s, timing.unet_calls) == (6.5, 3)
    assert timing.total_s == 2 + 19.5 + 4 + 0.5
    assert timing.rest_s == 0.5
    assert timing.images_per_s == 3 / timing.total_s
    assert timing.peak_memory_bytes == 77
    assert timing_of("fp32", drawings["fp32"], 1, 0).parts["unet"] == (42 + 51) / 2


def test_engines_draw_in_turn_and_are_left_as_they_were(clock: Clock) -> None:
    made = {"fp32": pipeline(clock, 1.0), "quantized": pipeline(clock, 1.0)}
    order: list[int] = []
    draw_in_turn(made, lambda each: (order.append(id(each)), draw(each)), 2)
    assert order == [id(x) for x in made.values()] * 3
    for each in made.values():
        assert [
            vars(x).keys() & {"forward", "decode", "encode"} for x in (each.unet, each.vae)
        ] == [
            set(),
            set(),
        ]


def test_a_part_that_fails_leaves_the_pipeline_as_it_was(clock: Clock) -> None:
    made = pipeline(clock, 1.0)

    def fail(each: Any) -> None:
        each.unet.forward()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        draw_in_turn({"fp32": made}, fail, 1)
    assert "forward" not in vars(made.unet)


@pytest.mark.parametrize("option", ["steps", "scheduler", "guidance", "images", "draws"])
def test_options_of_whole_images_need_the_option_pipeline(option: str) -> None:
    value = {"scheduler": "ddim"}.get(option, 1)
    with refused(f"--{option}", "--pipeline"):
        BenchmarkOptions(**{option: value})
    chosen = BenchmarkOptions(pipeline=True, **{option: value})
    assert BenchmarkOptions.from_json(chosen.to_json()) == chosen


def test_a_benchmark_without_whole_images_is_recorded_as_it_was_before_there_were_any() -> None:
    assert BenchmarkOptions().to_json().keys() == {"batches", "runs", "warmup", "static"}


FEW = ("--runs", "1", "--warmup", "0", "--batch", "1", "--no-static", "--pipeline", "--draws", "1")


@pytest.mark.slow
def test_a_whole_image_is_timed_with_both_engines_and_any_scheduler(workspace: Path) -> None:
    where = ("-w", workspace, "--backend", "onnxruntime")
    chosen = ("--steps", "4", "--scheduler", "pndm", "--images", "2", "--guidance", "3")
    ended = cli("benchmark", *where, *FEW, *chosen, "--json")
    assert ended.code == 0, ended.err
    whole = ended.json["pipeline"]
    opened = Workspace.open(workspace)
    scheduler = load_model(opened.source).load_scheduler("pndm")
    scheduler.set_timesteps(4)
    calls = len(scheduler.timesteps)
    assert calls > 4  # it asks several times at its first steps
    assert [x["engine"] for x in whole["engines"]] == ["quantized", "fp32"]
    for engine in whole["engines"]:
        assert set(engine["parts"]) == {"text encoder", "unet", "decoder"}
        assert engine["unet_calls"] == calls
        parts = sum(engine["parts"].values())
        assert 0 < parts < engine["total_s"]
        assert parts + engine["rest_s"] == pytest.approx(engine["total_s"])
        assert engine["peak_memory_bytes"] > 10**7
    assert (whole["steps"], whole["scheduler"], whole["images"]) == (4, "pndm", 2)
    assert whole["guidance"] == 3
    assert (whole["height"], whole["width"]) == (64, 64)
    assert "Whole image" in results.tables(opened)
    assert cli("report", "-w", workspace).code == 0
    page = Page((workspace / "reports" / "report.html").read_text(encoding="utf-8"))
    assert f"UNet, {calls} calls" in page.section("speed")


@pytest.mark.slow
def test_a_model_without_prompts_has_no_whole_images(ldm_chain: Chain) -> None:
    with refused("--pipeline"):
        benchmark_pipeline.check(Workspace.open(ldm_chain.root), BenchmarkOptions(pipeline=True))


def test_the_tables_of_results_hold_what_the_stages_found(mini_chain: Chain) -> None:
    opened = Workspace.open(mini_chain.root)
    text = results.tables(opened)
    verified = opened.stages["verify/onnxruntime"].details
    assert f"{sum(b['codes'] for b in verified['buckets']):,} codes compared" in text
    for engine in ("quantized", "static scale", "fp32"):
        assert f"| {engine} | 2 |" in text
    for name in ("FP32", "PTQ", "QuEST", "ONNX Runtime"):
        assert f" {name} |" in text
    for first in ("UNet on ONNX Runtime", "Engine for ONNX Runtime"):
        [header] = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
        assert "gain over FP32" in header
    asked = opened.stages["benchmark/onnxruntime"].details["precision"]["asked_int8_share"]
    assert f"{asked:.1%} asked to run on integers" in text
    assert "onnxruntime" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in rows)


def test_results_are_written_with_the_page_beside_them(mini_chain: Chain, tmp_path: Path) -> None:
    results.write(Workspace.open(mini_chain.root), tmp_path / "results")
    assert {x.name for x in (tmp_path / "results").iterdir()} == {"README.md", "emoji-w4a4.html"}
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert "(emoji-w4a4.html)" in text


def test_results_tell_what_the_machine_is_and_nothing_else_of_it(mini_chain: Chain) -> None:
    text = results.tables(Workspace.open(mini_chain.root))
    assert f"on {platform.system()} {platform.machine()}" in text
    assert processor_name() in text
    assert platform.release() not in text
    assert str(mini_chain.root) not in text


def test_results_of_what_is_not_finished_are_refused_and_those_of_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Workspace.create(tmp_path / "w", "emoji", Scheme.parse("w4a4", buckets=2))
    (tmp_path / "README.md").write_text("before")
    with refused("calibrate", "run"):
        results.write(made, tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {"w", "README.md"}
    for place in ("w", "nowhere"):
        monkeypatch.setattr("sys.argv", ["results", "-w", str(tmp_path / place)])
        with pytest.raises(SystemExit) as ended:
            results.main()
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["-w", "--run"])
def test_a_backend_that_there_is_none_of_is_refused_before_anything_runs(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["results", place, "emoji", "--backend", "foo"])
    with pytest.raises(SystemExit) as ended:
        results.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "'foo'" in err
    assert "openvino" in err


@pytest.mark.parametrize("option", [("--backend", "onnxruntime"), ("--bits", "w4a4")])
def test_an_option_that_a_workspace_does_not_take_is_refused(
    option: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["results", "-w", "somewhere", *option])
    with pytest.raises(SystemExit) as ended:
        results.main()
    assert ended.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_a_reader_that_has_enough_of_the_tables_ends_them_quietly(
    mini_chain: Chain, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        monkeypatch.setattr("sys.argv", ["results", "-w", str(mini_chain.root)])
        with pytest.raises(SystemExit) as ended:
            results.main()
        assert ended.value.code == 1
    assert capfd.readouterr().err == ""


def test_the_tables_call_backends_as_the_page_does() -> None:
    template = files("quest_deploy.evaluation.report_page").joinpath("page.html").read_text()
    names = ", ".join(f'"{name}": "{title}"' for name, title in results.BACKENDS.items())
    assert f"{{{names}}}" in template


def test_the_site_lists_the_page_of_results_once() -> None:
    site = results.SITE.read_text().replace(results.ENTRY, "")
    added = results.listed(site)
    assert added.count("results/README.md") == 1
    assert added.replace(results.ENTRY, "") == site
    assert results.listed(added) == added
    with refused("results/README.md"):
        results.listed("nav: []\n")


def test_a_run_for_results_times_once_and_prints_nothing_but_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def go(workspace: Workspace, backends: Any, options: Any, progress: Any, told: Any) -> Any:
        asked.update(options)
        progress("timing", 1, 2)
        return Run(workspace, backends, {"report": {"page": "report.html"}}, {"onnxruntime": "no"})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results.pipeline, "run", go)
    made = results.run("emoji", "w4a8", "onnxruntime")
    assert made.scheme.name == "w4a8"
    assert asked["benchmark"].pipeline
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["timing 1 2", "no report.html"]
