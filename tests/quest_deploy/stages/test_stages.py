"""The stages as they are declared: the graph agrees with what they record, and one mechanism runs
them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts.image_folder import ImageFolder
from quest_deploy.artifacts.scaled_folder import ScaledFolder
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.artifacts.workspace import READ_CALIBRATED, Workspace
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.models.loading import resolve_source
from quest_deploy.progress import Progress, no_progress
from quest_deploy.stages import (
    CALIBRATE,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    LORA,
    REPORT,
    SENSITIVITY,
    STAGES,
    VERIFY,
)
from quest_deploy.stages.options import (
    BenchmarkOptions,
    CalibrateOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    GenerateOptions,
    LoraOptions,
    ReferenceOptions,
    SensitivityOptions,
    StageOptions,
)
from quest_deploy.stages.run import as_exported, kept
from quest_deploy.stages.stage import DEPLOYED, FINISHED, Stage, as_recorded
from tests.helpers import refused
from tests.quest_deploy.support import Chain

BY_NAME = {stage.name: stage for stage in STAGES}


def test_every_stage_stands_behind_those_that_it_reads() -> None:
    for i, stage in enumerate(STAGES):
        known = (DEPLOYED, FINISHED, *STAGES[:i])
        assert all(read in known for read in stage.reads), stage.name


def test_every_stage_but_import_and_lora_has_work_in_its_module() -> None:
    # They must not make their workspace before they succeed, so their work is made where it is
    # called.
    without = [stage.name for stage in STAGES if not hasattr(stage.module, "work")]
    assert without == ["import", "lora"]


def test_stages_record_the_inputs_and_the_files_that_they_declare(mini_chain: Chain) -> None:
    workspace = Workspace.open(mini_chain.root)
    assert len(workspace.stages) > len(STAGES) - 3
    for name, record in workspace.stages.items():
        stage, _, backend = name.partition("/")
        declared = BY_NAME[stage]
        assert set(record.inputs) == set(declared.inputs(workspace, backend)), name
        for file in record.files:
            assert any(fnmatchcase(file, pattern) for pattern in declared.writes), file
        for pattern in declared.writes:
            assert any(fnmatchcase(file, pattern) for file in record.files), pattern


def test_the_workspace_knows_which_stages_read_the_calibrated_checkpoint() -> None:
    assert {stage.name for stage in STAGES if CALIBRATE in stage.reads} == set(READ_CALIBRATED)


@pytest.mark.parametrize(
    "options",
    [
        CalibrateOptions(samples=3, method="qdiff", reconstruction_batch=2, prompts=("a", "b")),
        FinetuneOptions(stages=("sensitive",), layers=("conv_in",), seed=3),
        SensitivityOptions(samples=2, batch=8),
        BenchmarkOptions(batch=(2, 4)),
        GenerateOptions(labels="01", prompt=("a cat",)),
        EvaluateOptions(images=4),
        CalibrateOptions(image_folder=ImageFolder("/pictures", "0")),
        CalibrateOptions(
            controlnet=(ScaledFolder("/canny", 0.5, "0"), ScaledFolder("/depth", 1.0, "1")),
            control_images=(ImageFolder("/pictures", "0"),),
        ),
        CalibrateOptions(ip_adapter_images=ImageFolder("/pictures", "0")),
        ExportOptions(controlnet_inputs=False),
        EvaluateOptions(image_folder=ImageFolder("/pictures", "0")),
    ],
    ids=lambda options: type(options).__name__,
)
def test_recorded_options_are_read_back(options: StageOptions) -> None:
    assert type(options).from_json(as_recorded(options)) == options


def test_unknown_recorded_options_are_refused() -> None:
    with refused("colour"):
        FinetuneOptions.from_json({"seed": 0, "colour": "red"})


@pytest.fixture
def new(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "w", "emoji", Scheme.parse("w4a4", buckets=2))


def writes(text: str) -> Callable[[Workspace, Any, Progress], tuple[list[Path], dict[str, Any]]]:
    """The work of a stage that writes ``text``."""

    def work(
        workspace: Workspace, options: Any, progress: Progress
    ) -> tuple[list[Path], dict[str, Any]]:
        progress("writing", 1, 1)
        path = workspace.path("file")
        path.write_text(text)
        return [path], {"text": text}

    return work


def fails(error: type[BaseException]) -> Any:
    def work(workspace: Workspace, options: Any, progress: Progress) -> Any:
        raise error

    return work


A: Stage[Any, Any] = Stage("calibrate", CalibrateOptions, writes=("file",), long=True)


def test_a_stage_runs_again_only_where_options_or_files_changed(new: Workspace) -> None:
    run, options = A.run, CalibrateOptions(samples=1)
    assert run(new, options, work=writes("one")) == {"text": "one"}
    assert run(new, options, reuse=True, work=writes("two")) == {"text": "one"}
    other = CalibrateOptions(samples=2)
    assert run(new, other, reuse=True, work=writes("three")) == {"text": "three"}
    new.path("file").write_text("changed")
    assert run(new, other, reuse=True, work=writes("four")) == {"text": "four"}
    assert run(new, other, work=writes("five")) == {"text": "five"}


def test_options_that_the_manifest_could_not_hold_are_refused_before_the_work(
    new: Workspace,
) -> None:
    with refused("UTF-8"):
        A.run(new, CalibrateOptions(prompts=("\udcff",)), work=fails(AssertionError))
    assert new.interrupted_stages == []


def test_a_stage_tells_its_progress(new: Workspace) -> None:
    told: list[tuple[str, int, int]] = []
    A.run(new, CalibrateOptions(), lambda *step: told.append(step), work=writes("one"))
    assert told == [("writing", 1, 1)]


def test_a_stage_reads_only_what_is_finished_and_up_to_date(new: Workspace) -> None:
    with pytest.raises(InputError):
        SENSITIVITY.run(new, SensitivityOptions(), work=writes("two"))
    A.run(new, CalibrateOptions(), work=writes("one"))
    new.path("file").unlink()
    with refused("file"):
        SENSITIVITY.run(new, SensitivityOptions(), work=writes("two"))
    assert list(new.stages) == ["calibrate"]


def test_only_an_interruption_keeps_the_options_of_a_long_stage(new: Workspace) -> None:
    for error, samples in ((InputError, None), (KeyboardInterrupt, 7)):
        with pytest.raises(error):
            A.run(new, CalibrateOptions(samples=7), work=fails(error))
        assert new.options_of("calibrate").get("samples") == samples
    assert new.stages == {}
    A.run(new, CalibrateOptions(samples=8), work=writes("one"))
    assert new.options_of("calibrate")["samples"] == 8
    short = dataclasses.replace(A, long=False)
    with pytest.raises(KeyboardInterrupt):
        short.run(new, CalibrateOptions(samples=9), work=fails(KeyboardInterrupt))
    assert new.options_of("calibrate")["samples"] == 8


def test_bad_input_keeps_the_options_that_were_interrupted_before(new: Workspace) -> None:
    with pytest.raises(KeyboardInterrupt):
        A.run(new, CalibrateOptions(samples=7), work=fails(KeyboardInterrupt))
    for samples in (7, 8, 7):  # such as a folder that the options name and that was moved
        with pytest.raises(InputError):
            A.run(new, CalibrateOptions(samples=samples), work=fails(InputError))
        assert new.options_of("calibrate")["samples"] == 7
    with pytest.raises(QuestDeployError):
        A.run(new, CalibrateOptions(samples=7), work=fails(QuestDeployError))
    assert new.interrupted_stages == []


def test_run_exports_again_as_before_and_what_lora_made_as_its_base(
    new: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").write_text("codes")
    options = LoraOptions(
        base=tmp_path,
        checkpoint=tmp_path / "checkpoint",
        loras=(),
        export=ExportOptions(controlnet_inputs=True).to_json(),
    )
    assert kept(EXPORT, new, {}) == ExportOptions()
    LORA.run(new, options, work=writes("one"))
    assert kept(EXPORT, new, {}) == ExportOptions(controlnet_inputs=True)
    assert as_exported(new, ReferenceOptions()).controlnet_inputs is True
    for chosen in (ExportOptions(), ExportOptions(controlnet_inputs=False)):
        EXPORT.run(new, chosen, work=writes("one"))
        assert kept(EXPORT, new, {}) == chosen


def test_going_on_with_other_options_than_were_interrupted_is_told(
    new: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    for chosen, told in ((7, False), (7, False), (8, True)):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            A.run(new, CalibrateOptions(samples=chosen), work=fails(KeyboardInterrupt))
        assert ("samples 7, now 8" in caplog.text) == told
        assert ("goes on with the new ones" in caplog.text) == told
    assert new.interrupted_stages == ["calibrate"]
    A.run(new, CalibrateOptions(samples=8), work=writes("one"))
    assert new.interrupted_stages == []


def test_what_is_deployed_is_the_finetuned_checkpoint_where_there_is_one(new: Workspace) -> None:
    A.run(new, CalibrateOptions(), work=writes("one"))
    assert EXPORT.inputs(new) == ["calibrate"]
    FINETUNE.run(new, FinetuneOptions(), work=writes("one"))
    assert EXPORT.inputs(new) == ["calibrate", "finetune"]


def test_the_report_reads_all_others_that_are_up_to_date(new: Workspace) -> None:
    A.run(new, CalibrateOptions(), work=writes("one"))
    assert REPORT.inputs(new) == ["calibrate"]
    REPORT.run(new, StageOptions(), work=writes("one"))
    assert REPORT.inputs(new) == ["calibrate"]
    assert new.outdated_by("calibrate") == []
    A.run(new, CalibrateOptions(), work=writes("two"))
    assert new.outdated_by("calibrate") == ["report"]
    new.path("file").write_text("changed")
    assert REPORT.inputs(new) == []


def test_a_stage_of_an_engine_reads_those_of_the_same_backend(new: Workspace) -> None:
    assert VERIFY.recorded_name("openvino") == "verify/openvino"
    assert VERIFY.inputs(new, "openvino") == ["build-engine/openvino", "reference"]


@pytest.mark.parametrize("stage", [GENERATE, EVALUATE])
def test_random_weights_are_refused_before_the_engine_is_opened(
    tmp_path: Path, stage: Stage[Any, Any]
) -> None:
    source = resolve_source("ldm-bedroom", random_weights=True)
    workspace = Workspace.create(tmp_path / "ws", source, Scheme.parse("w4a4"))
    with refused("ldm-bedroom", "random weights"):  # there is no engine
        stage.module.work(workspace, stage.options(), no_progress)
