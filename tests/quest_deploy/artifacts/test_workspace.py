from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts.scheme import SCHEME_VERSION, Scheme
from quest_deploy.artifacts.workspace import MANIFEST, Workspace
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import sealed
from tests.helpers import refused

SCHEME = Scheme.parse("w4a4", buckets=3)


def finish(
    workspace: Workspace,
    stage: str,
    inputs: tuple[str, ...] = (),
    content: str = "",
    **options: Any,
) -> Path:
    """Record a stage that wrote one file."""
    path = workspace.path(stage.replace("/", "-"))
    path.write_text(content or stage)
    workspace.record(stage, inputs=inputs, options=options, files=[path], details={})
    return path


@pytest.fixture
def made(tmp_path: Path) -> Workspace:
    """A workspace in which calibrate, finetune, export and build-engine finished."""
    workspace = Workspace.create(tmp_path / "ws", "emoji", SCHEME)
    finish(workspace, "calibrate", seed=1)
    finish(workspace, "finetune", ("calibrate",))
    finish(workspace, "export", ("calibrate", "finetune"))
    finish(workspace, "build-engine/openvino", ("export",))
    return workspace


def test_a_workspace_reads_back_as_it_was_written(made: Workspace) -> None:
    opened = Workspace.open(made.root)
    assert (opened.model, opened.scheme, opened.stages) == ("emoji", SCHEME, made.stages)


def test_a_finished_stage_is_required_without_complaint(made: Workspace) -> None:
    assert made.require("build-engine/openvino") == made.stages["build-engine/openvino"]


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("reference", "quest-deploy reference -w"),
        ("verify/openvino", "quest-deploy verify --backend openvino -w"),
    ],
)
def test_an_unfinished_stage_is_named_with_its_command(
    made: Workspace, stage: str, command: str
) -> None:
    with refused(f"{command} {made.root}"):
        made.require(stage)


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (lambda path: path.write_text("FINETUNE"), ("SHA-256",)),
        (lambda path: path.write_text("fine"), (8, 4)),
        (lambda path: path.unlink(), ()),
    ],
    ids=["edited", "truncated", "removed"],
)
@pytest.mark.parametrize("wanted", ["finetune", "build-engine/openvino"])
def test_a_damaged_file_is_named_with_the_command_that_makes_it_again(
    made: Workspace, wanted: str, damage: Callable[[Path], Any], facts: tuple[object, ...]
) -> None:
    damage(made.path("finetune"))
    with refused(made.path("finetune"), *facts, f"quest-deploy finetune -w {made.root}"):
        made.require(wanted)


def test_a_stage_is_outdated_once_an_upstream_stage_wrote_something_else(made: Workspace) -> None:
    finish(made, "finetune", ("calibrate",), content="another")
    with refused("`export`", "`finetune`", f"quest-deploy export -w {made.root}"):
        made.require("build-engine/openvino")


def test_a_stage_stays_up_to_date_when_an_upstream_stage_writes_the_same_again(
    made: Workspace,
) -> None:
    finish(made, "finetune", ("calibrate",))
    assert made.require("build-engine/openvino").inputs == {"export": made.stages["export"].digest}


def test_a_stage_is_fresh_only_with_the_same_inputs_options_and_files(made: Workspace) -> None:
    def fresh(**options: Any) -> bool:
        return made.fresh("calibrate", (), options) is not None

    assert fresh(seed=1)
    assert not fresh(seed=2)
    assert made.fresh("reference", (), {}) is None
    assert made.fresh("export", ("calibrate", "finetune"), {}) is not None
    assert made.fresh("export", ("calibrate",), {}) is None
    made.path("calibrate").write_text("Calibrate")
    assert not fresh(seed=1)


def test_a_stage_that_another_version_of_the_program_made_is_not_fresh(
    made: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.artifacts.workspace.__version__", "99.0")
    assert made.fresh("calibrate", (), {"seed": 1}) is None


def test_a_stage_is_not_fresh_once_its_input_changed(made: Workspace) -> None:
    finish(made, "calibrate", content="another", seed=1)
    assert made.fresh("finetune", ("calibrate",), {}) is None


def test_the_checkpoint_to_deploy_is_the_finetuned_one_where_there_is_one(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "ws", "emoji", SCHEME)
    finish(workspace, "calibrate")
    assert (workspace.checkpoint_stage, workspace.checkpoint_path.name) == (
        "calibrate",
        "calibrated.safetensors",
    )
    finish(workspace, "finetune", ("calibrate",))
    assert (workspace.checkpoint_stage, workspace.checkpoint_path.name) == (
        "finetune",
        "checkpoint.safetensors",
    )


def test_the_sensitivity_of_the_calibrated_model_stays_up_to_date_after_finetuning(
    made: Workspace,
) -> None:
    finish(made, "sensitivity", ("calibrate",))
    assert made.require("sensitivity") == made.stages["sensitivity"]
    finish(made, "calibrate", content="another", seed=1)
    with refused("`sensitivity`", "`calibrate`", f"quest-deploy sensitivity -w {made.root}"):
        made.require("sensitivity")


def test_the_manifest_says_what_made_each_stage(made: Workspace) -> None:
    entry = json.loads((made.root / MANIFEST).read_text())["stages"]["finetune"]
    assert {"quest-deploy", "time", "python", "platform", "onnx"} <= entry["made"].keys()
    assert entry["files"]["finetune"]["bytes"] == len("finetune")
    assert entry["inputs"] == {"calibrate": made.stages["calibrate"].digest}


RECORD: dict[str, Any] = {"inputs": {}, "options": {}, "files": {}, "details": {}, "made": {}}


def manifest(**changes: Any) -> str:
    """A manifest's text, with changes."""
    content = {
        "format": "quest-deploy workspace",
        "version": 1,
        "model": "emoji",
        "source": {"name": "emoji"},
        "scheme": SCHEME.to_json(),
        "stages": {"calibrate": RECORD},
    }
    return json.dumps(sealed(content | changes))


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (manifest(version=2), "1, 2"),
        (manifest(version=None), "1, None"),
        (manifest(format="something"), "quest-deploy workspace"),
        ("[]", "quest-deploy workspace"),
        (manifest()[:-40], "JSON"),
        ("", "JSON"),
        (manifest(scheme={"version": 9}), f"scheme, {SCHEME_VERSION}, 9"),
        (manifest(scheme=None), "scheme, JSON"),
        (
            manifest(scheme=SCHEME.to_json() | {"weight_bits": 3}),
            "weight_bits",
        ),
        (manifest(model=None), "model"),
        (
            manifest(stages={"calibrate": RECORD | {"inputs": {"calibrate": "0"}}}),
            "cycle",
        ),
        (
            manifest(
                stages={"a": RECORD | {"inputs": {"b": "0"}}, "b": RECORD | {"inputs": {"a": "0"}}}
            ),
            "cycle",
        ),
        (
            manifest(
                stages={"calibrate": RECORD | {"files": {"../a": {"sha256": "0", "bytes": 1}}}}
            ),
            "stages.calibrate",
        ),
        (
            manifest(stages={"calibrate": RECORD | {"files": {"/a": {"sha256": "0", "bytes": 1}}}}),
            "stages.calibrate",
        ),
        (manifest(more=1), "more"),
        (manifest(source={"name": "emoji", "seed": "1"}), "source.seed"),
        (manifest(source={"location": "/a"}), "source.name"),
        (manifest(stages=[]), "stages"),
        (manifest(stages={"calibrate": {"inputs": {}}}), "stages.calibrate"),
        (
            manifest(stages={"calibrate": {"inputs": {}, "options": {}, "files": {}, "more": 1}}),
            "stages.calibrate",
        ),
        (
            manifest(stages={"calibrate": {"inputs": {}, "options": {}, "files": []}}),
            "stages.calibrate.files",
        ),
        (
            manifest(stages={"calibrate": {"inputs": {}, "options": {}, "files": {"a": 1}}}),
            "stages.calibrate",
        ),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path: Path, text: str, facts: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with refused(tmp_path, *facts.split(", "), "-w") as caught:
        Workspace.open(tmp_path)

    # Nothing makes a manifest again, and without it the folder is no workspace: deleting it would
    # lose what it says.

    assert "delete" not in str(caught.value)


def test_a_manifest_without_a_hash_is_said_to_be_of_an_earlier_version_or_edited(
    tmp_path: Path,
) -> None:
    content = json.loads(manifest())
    del content["sha256"], content["source"]  # the first versions wrote neither
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with refused(tmp_path / MANIFEST, "sha256", "earlier version", "-w"):
        Workspace.open(tmp_path)


def test_a_stage_whose_input_is_not_in_the_manifest_is_not_up_to_date(made: Workspace) -> None:
    del made.stages["export"]
    with refused("`export`", f"quest-deploy export -w {made.root}"):
        made.require("build-engine/openvino")


def test_no_workspace_is_an_error_that_names_the_first_command(tmp_path: Path) -> None:
    with refused(f"quest-deploy calibrate -w {tmp_path}"):
        Workspace.open(tmp_path)


def test_a_folder_that_holds_other_things_never_becomes_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with refused(tmp_path, "-w"):
        Workspace.create(tmp_path, "emoji", SCHEME)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_never_becomes_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", "-w"):
        Workspace.create(tmp_path / "file", "emoji", SCHEME)


def test_a_folder_in_which_creation_was_killed_becomes_a_workspace(tmp_path: Path) -> None:
    (tmp_path / f".tmp-123-{MANIFEST}").write_text("{")
    assert Workspace.create(tmp_path, "emoji", SCHEME).stages == {}


def test_two_processes_cannot_write_in_one_workspace_at_once(made: Workspace) -> None:
    program = (
        "import sys; from pathlib import Path; from quest_deploy.artifacts.workspace import "
        "Workspace\n"
        f"with Workspace.open(Path({str(made.root)!r})).locked(): print('locked', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            refused(made.root, error=QuestDeployError),
            made.locked(),
        ):
            pass

        other.communicate("")
    with made.locked():
        assert finish(made, "reference").exists()


def test_what_a_killed_process_left_half_written_is_cleared_away(made: Workspace) -> None:
    left = [
        made.path(*parts)
        for parts in (
            (".tmp-1-unet.onnx",),
            ("engines", ".tmp-1-openvino"),
            ("reports", ".tmp-1-verify.json"),
        )
    ]
    for path in left:
        path.mkdir(parents=True)
        (path / "part").write_text("half")
    kept = made.path("reports", "verify.json")
    kept.write_text("{}")
    with made.locked():
        assert not any(path.exists() for path in left)
    assert kept.exists()


def test_a_process_keeps_what_another_one_finished_since_it_opened_the_workspace(
    made: Workspace,
) -> None:
    first, second = Workspace.open(made.root), Workspace.open(made.root)
    for workspace, stage in ((first, "reference"), (second, "build-engine/onnxruntime")):
        with workspace.locked():
            finish(workspace, stage)
    assert {"reference", "build-engine/onnxruntime"} <= Workspace.open(made.root).stages.keys()


def test_a_manifest_that_was_edited_is_refused_even_if_it_is_sound(tmp_path: Path) -> None:
    Workspace.create(tmp_path / "w", "emoji", Scheme.parse("w4a4"))
    path = tmp_path / "w" / MANIFEST
    path.write_text(path.read_text().replace('"weight_bits": 4', '"weight_bits": 8'))
    with refused(path, "-w"):
        Workspace.open(tmp_path / "w")


STEPS_OF_A_CHANGE = ("fsync", "link", "mkdir", "open", "replace", "rename", "rmdir", "unlink")


def change(root: Path, killed_at: int) -> bool:
    """Let a process record calibrate anew; whether it came to its end before its ``killed_at``-th
    step of a change, at which it dies as by SIGKILL.
    """
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                if next(steps) == killed_at:
                    os._exit(9)
                return real(*args, **kwargs)

            return step

        for name in STEPS_OF_A_CHANGE:
            setattr(os, name, counted(getattr(os, name)))
        workspace = Workspace.open(root)
        with workspace.locked():
            files = [workspace.new("a"), workspace.new("folder", "b"), workspace.new("new")]
            for file in files:
                file.write_text("after")
            workspace.record("calibrate", inputs=(), options={}, files=files, details={})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_kill_at_any_moment_leaves_the_files_of_before_or_those_of_after(tmp_path: Path) -> None:
    found = []
    for killed_at in itertools.count(1):
        root = tmp_path / str(killed_at)
        workspace = Workspace.create(root, "emoji", SCHEME)
        (root / "folder").mkdir()
        files = [workspace.path("a"), workspace.path("folder", "b"), workspace.path("old")]
        for file in files:
            file.write_text("before")
        workspace.record("calibrate", inputs=(), options={}, files=files, details={})
        ended = change(root, killed_at)
        reopened = Workspace.open(root)
        with reopened.reading():
            reopened.require("calibrate")
        with reopened.locked():  # clears away what was not recorded
            reopened.require("calibrate")
        names = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        contents = {(root / name).read_text() for name in names - {".lock", MANIFEST}}
        assert (names - {".lock", MANIFEST, "a", "folder/b"}, contents) in (
            ({"old"}, {"before"}),
            ({"new"}, {"after"}),
        )
        found.append(contents.pop())
        if ended:
            break
    assert found == sorted(found, reverse=True)  # never back again
    assert found.count("before") > 5
    assert found.count("after") > 5


def test_what_a_stage_wrote_is_gone_if_it_fails(made: Workspace) -> None:
    before = sorted(made.root.rglob("*"))
    with pytest.raises(OSError, match="disk"), made.locked():
        made.new("reports", "half").write_text("half")
        raise OSError("disk")
    assert sorted(path for path in made.root.rglob("*") if path.name != ".lock") == before


def test_a_name_that_is_no_utf_8_is_refused_and_the_workspace_stays_as_it_was(
    made: Workspace, tmp_path: Path
) -> None:
    stages = dict(made.stages)
    for given in (
        {"options": {"clip": "\udcff"}, "details": {}},
        {"options": {}, "details": {"picture": "\udcff"}},
    ):
        with refused("UTF-8"), made.locked():
            made.record("generate/openvino", inputs=(), files=(), **given)
        with made.locked():
            assert made.stages == stages
    with refused("UTF-8"):
        Workspace.create(tmp_path / "\udcff", "emoji", SCHEME)
    assert not (tmp_path / "\udcff").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_what_it_names_is_left_alone(
    made: Workspace, tmp_path: Path, kind: str
) -> None:
    outside, lock = tmp_path / "outside", made.path(".lock")
    outside.write_text("mine")
    make = {"link": lambda: lock.symlink_to(outside), "pipe": lambda: os.mkfifo(lock)}
    make.get(kind, lock.mkdir)()
    for open_lock in (made.locked, made.reading):
        with refused(lock), open_lock():
            pass
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["images", "reports", "engines/openvino", ".tmp-staged", ".changes"]
)
def test_a_linked_folder_is_refused_and_nothing_is_written_or_deleted_there(
    made: Workspace, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".tmp-1-x").write_text("mine")
    link = made.path(name)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with refused(link), made.locked():
        made.new(name, "report").write_text("")
    assert [path.name for path in outside.iterdir()] == [".tmp-1-x"]


def test_a_file_that_is_a_link_is_read_and_replaced_and_its_target_left_alone(
    made: Workspace, tmp_path: Path
) -> None:
    outside, linked = tmp_path / "cache", made.path("calibrate")
    os.replace(linked, outside)
    linked.symlink_to(outside)
    made.require("calibrate")
    with made.locked():
        file = made.new("calibrate")
        file.write_text("anew")
        made.record("calibrate", inputs=(), options={}, files=[file], details={})
    assert (outside.read_text(), linked.read_text()) == ("calibrate", "anew")
    assert not linked.is_symlink()


def test_a_manifest_that_is_a_pipe_is_refused_at_once(made: Workspace) -> None:
    made.path(MANIFEST).unlink()
    os.mkfifo(made.path(MANIFEST))
    with refused(made.path(MANIFEST)):
        Workspace.open(made.root)


def test_several_processes_read_at_once_and_none_writes_meanwhile(made: Workspace) -> None:
    other = Workspace.open(made.root)
    writer = Workspace.open(made.root)
    with made.reading(), other.reading(), pytest.raises(QuestDeployError), writer.locked():
        pass
    with writer.locked(), pytest.raises(QuestDeployError), other.reading():
        pass


def test_where_several_stages_are_outdated_the_first_is_named(made: Workspace) -> None:
    finish(made, "calibrate", content="anew", seed=2)
    assert made.outdated_by("calibrate") == ["finetune", "export", "build-engine/openvino"]
    with refused("quest-deploy finetune"):
        made.require("build-engine/openvino")
    finish(made, "finetune", ("calibrate",), content="anew")
    assert made.outdated_by("finetune") == ["export", "build-engine/openvino"]
    with refused("quest-deploy export"):
        made.require("build-engine/openvino")


@pytest.mark.parametrize("stage", ["calibrate", "finetune"])
def test_a_stage_outdates_all_that_is_not_to_be_used_after_it(tmp_path: Path, stage: str) -> None:
    made = Workspace.create(tmp_path / "ws", "emoji", SCHEME)
    finish(made, "calibrate")
    finish(made, "sensitivity", ("calibrate",))
    finish(made, "reference", ("calibrate",))
    finish(made, "verify/openvino")  # listed before what it reads
    finish(made, "export", ("calibrate",))
    finish(made, "build-engine/openvino", ("export",))
    finish(made, "verify/openvino", ("build-engine/openvino", "reference"))
    assert made.outdated_by("calibrate") == []
    finish(made, stage, () if stage == "calibrate" else ("calibrate",), content="anew")
    refused_ones = [name for name, why in made.states().items() if why is not None]
    assert made.outdated_by(stage) == refused_ones
    assert {"build-engine/openvino", "verify/openvino"} < {*refused_ones}
    assert ("sensitivity" in refused_ones) == (stage == "calibrate")


def test_a_workspace_that_was_made_for_a_stage_that_failed_is_gone_and_can_be_used_again(
    tmp_path: Path,
) -> None:
    for there in (False, True):
        root = tmp_path / str(there)
        if there:
            root.mkdir()
        workspace = Workspace.create(root, "emoji", SCHEME)
        with workspace.locked():
            workspace.discard_if_unused()
        assert root.exists() is there
        with workspace.locked():
            finish(workspace, "calibrate")
        assert Workspace.open(root).stages.keys() == {"calibrate"}
