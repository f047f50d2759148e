"""The workspace: the folder in which one model at one scheme goes from checkpoint to report.

Stages meet in its files. ``manifest.json`` records, for every stage that finished, the hashes of
what it wrote and of what it was made from; a stage that reads another's files checks both first, so
a truncated, edited or outdated file is never used.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import stat
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainValidator

from quest_deploy import __version__
from quest_deploy.artifacts.model_source import IMPORTED_ALONE, ModelSource
from quest_deploy.artifacts.schema import parse_document, validated
from quest_deploy.artifacts.scheme import Scheme
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import (
    PLAIN,
    TEMPORARY_PREFIX,
    check_text,
    lock,
    read_json,
    remove_temporaries,
    sealed,
    sha256_of,
    sha256_of_json,
    sync,
    sync_all,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FORMAT = "quest-deploy workspace"
VERSION = 1
MANIFEST = "manifest.json"
TRAJECTORIES = "trajectories.safetensors"
CALIBRATED = "calibrated.safetensors"
RECONSTRUCT_STATE = "reconstruct-state"
CHECKPOINT = "checkpoint.safetensors"
FINETUNE_STATE = "finetune-state.pt"
FINETUNE_TARGETS = "finetune-targets.bin"
GRAPH = "unet.onnx"
REFERENCE = "reference"
REFERENCE_STATE = "reference-state"
ENGINES = "engines"
PARTS = "parts"
REPORTS = "reports"
SENSITIVITY_REPORT = "sensitivity.json"
REPORT_PAGE = "report.html"
IMAGES = "images"
SCHEDULES = "schedules"
_REPORTED_PACKAGES = (
    "torch",
    "diffusers",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt-rtx",
    "tensorrt",
    "polygraphy",
)
_REPAIR = (
    "only this file says how the others were made: use the quest-deploy that wrote it, restore it "
    "from a copy, or start a new workspace with -w"
)
STAGED = f"{TEMPORARY_PREFIX}staged"
"""What the running stage has written, until it is recorded."""
CHANGES = ".changes"
"""What a finished stage has written, on the way to its place."""
STARTED = "{}-options.json"
"""What a stage that takes long was started with, until it is done."""
READ_CALIBRATED = ("finetune", "sensitivity")
"""The stages that read the calibrated checkpoint where there is a finetuned one too, as
``quest_deploy.stages`` declares them.
"""


@validated("a stage's record")
@dataclass(frozen=True)
class StageRecord:
    """One finished stage.

    Attributes:
        inputs: the digests of the stages whose files it read, by stage.
        options: what the user chose.
        files: {"sha256", "bytes"} of each file it wrote, by path relative to the workspace.
        details: what it reports.
    """

    inputs: dict[str, str]
    options: dict[str, Any]
    files: dict[str, dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, entry in self.files.items():
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"expected paths inside the workspace, found {path}")
            if {key: type(value) for key, value in entry.items()} != {"sha256": str, "bytes": int}:
                raise ValueError(f"expected the SHA-256 and the bytes of {path}, found {entry}")

    @property
    def digest(self) -> str:
        """What identifies the stage's files."""
        return sha256_of_json({path: entry["sha256"] for path, entry in self.files.items()})


@validated("manifest")
@dataclass(frozen=True)
class _Manifest:
    """What a manifest says besides its format and version."""

    model: str
    scheme: Annotated[Scheme, PlainValidator(Scheme.from_json)]
    stages: dict[str, StageRecord]
    source: ModelSource


def check_vacant(root: Path, flag: str = "-w") -> None:
    """Raise InputError where ``root``, given with ``flag``, is a file or a folder that holds
    something already.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file, not a folder; give another one with {flag}")
    if root.exists() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in root.iterdir()):
        raise InputError(f"{root} is not empty; give another folder with {flag}")


FOLDED = (
    "its checkpoint is another workspace's with LoRAs folded in: calibrate and finetune that one, "
    "then fold them in again, or calibrate a new workspace with --lora"
)
"""Why a workspace that `quest-deploy lora` made is neither calibrated nor finetuned."""


class Workspace:
    """An open workspace. Make one with :meth:`create` or :meth:`open`."""

    def __init__(
        self, root: Path, source: ModelSource, scheme: Scheme, stages: dict[str, StageRecord]
    ) -> None:
        self.root, self.source, self.scheme, self.stages = root, source, scheme, stages
        self._is_new = self._made_folder = False

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r}, {self.model} at {self.scheme.name})"

    @property
    def model(self) -> str:
        """The model's name."""
        return self.source.name

    @classmethod
    def open(cls, root: Path) -> Workspace:
        """Open an existing workspace; raise InputError where there is none, or one that is damaged
        or of another version.
        """
        if not os.path.lexists(root / MANIFEST):  # a link to nowhere is named where it is read
            raise InputError(
                f"{root} is not a workspace: it has no {MANIFEST}; run `quest-deploy calibrate -w "
                f"{root}` first"
            )
        return cls._read(root, root / MANIFEST)

    @classmethod
    def _read(cls, root: Path, path: Path) -> Workspace:
        content = read_json(path, repair=_REPAIR)
        manifest = parse_document(
            _Manifest, content, FORMAT, VERSION, str(path), _REPAIR, sealed=True
        )
        inputs = {name: record.inputs for name, record in manifest.stages.items()}
        try:
            TopologicalSorter(inputs).prepare()
        except CycleError as e:
            raise InputError(f"{path}: stages form a cycle {e.args[1]}; {_REPAIR}") from e
        return cls(root, manifest.source, manifest.scheme, manifest.stages)

    @classmethod
    def create(cls, root: Path, model: ModelSource | str, scheme: Scheme) -> Workspace:
        """Make a new workspace, for a model's source or a name that says it all; raise InputError
        where the folder holds something, or the manifest could not hold its name.
        """
        check_text(str(root), "the workspace's folder")
        check_vacant(root)
        made_folder = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise
            raise InputError(
                f"cannot make the folder {root} ({e.strerror}); give another one with -w"
            ) from e
        workspace = cls(root, ModelSource(model) if isinstance(model, str) else model, scheme, {})
        workspace._is_new, workspace._made_folder = True, made_folder
        workspace._write(root / MANIFEST)
        return workspace

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other quest-deploy processes from reading and writing here; finish what a killed one
        had recorded, and clear away what it left half-written.

        Raises:
            InputError: a folder of the workspace is a link: its files would be written elsewhere.
            QuestDeployError: another process is at work here.
        """
        if self._is_new:
            self.root.mkdir(parents=True, exist_ok=True)  # where it was discarded
        with self._lock(shared=False):
            self._refuse_linked_folders()
            self._settle()
            if self._is_new and not self.path(MANIFEST).exists():
                self._write(self.path(MANIFEST))
            for folder in (
                self.root,
                *(
                    self.root / name
                    for name in (RECONSTRUCT_STATE, REFERENCE_STATE, ENGINES, REPORTS, IMAGES)
                ),
            ):
                remove_temporaries(folder)
            # Another process may have finished stages since.
            self.stages = Workspace.open(self.root).stages
            try:
                yield
            finally:
                shutil.rmtree(self.path(STAGED), ignore_errors=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other quest-deploy processes from writing here; several may read at once."""
        if (self.root / CHANGES).exists():
            with self.locked():
                pass  # which finishes them
        with self._lock(shared=True):
            self.stages = Workspace.open(self.root).stages
            yield

    @contextmanager
    def _lock(self, *, shared: bool) -> Iterator[None]:
        path, flags = self.root / ".lock", PLAIN | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as e:
            if shared and e.errno in (errno.EACCES, errno.EROFS):
                yield  # where nobody may write, nobody does
                return
            if e.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise InputError(f"{path}: expected a regular file; delete it") from e
        with os.fdopen(descriptor, "rb"):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{path}: expected a regular file; delete it")
            with ExitStack() as stack:
                try:
                    stack.enter_context(lock(descriptor, shared=shared))
                except BlockingIOError as e:
                    raise QuestDeployError(
                        f"{self.root} is in use by another quest-deploy process; wait for it to end"
                    ) from e
                yield

    def _refuse_linked_folders(self) -> None:
        for folder, names, _ in os.walk(self.root):
            for path in (Path(folder, name) for name in names):
                if path.is_symlink():
                    raise InputError(
                        f"{path} is a link to a folder, and its files would be written outside the "
                        "workspace; put the folder itself there"
                    )

    def path(self, *parts: str) -> Path:
        """A path inside the workspace."""
        return self.root.joinpath(*parts)

    def discard_if_unused(self) -> None:
        """Where no stage has finished or is under way since :meth:`create`, leave the folder as it
        was before: what comes next may be of another model. The next stage makes it again.
        """
        rest = {path.name for path in self.root.iterdir()} - {MANIFEST, ".lock", STAGED}
        if self._is_new and not self.stages and not rest:
            for name in (STAGED, ".lock", MANIFEST):
                self.remove(name)
            if self._made_folder:
                self.root.rmdir()

    def remove(self, name: str) -> None:
        """Delete a file or folder of the workspace, if there is one."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def new(self, *parts: str) -> Path:
        """Where the running stage writes the file that :meth:`record` moves to ``path(*parts)``;
        its folder is made.
        """
        path = self.path(STAGED, *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def checkpoint_stage(self) -> str:
        """The stage whose checkpoint is to be deployed: finetune's if there is one, else import's
        or lora's, else calibrate's.
        """
        return next(
            (stage for stage in ("finetune", "import", "lora") if stage in self.stages), "calibrate"
        )

    @property
    def checkpoint_inputs(self) -> tuple[str, ...]:
        """The stages that a stage reads which works on the checkpoint to be deployed."""
        return (
            ("calibrate", "finetune")
            if self.checkpoint_stage == "finetune"
            else (self.checkpoint_stage,)
        )

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint to be deployed."""
        return self.path(CHECKPOINT if self.checkpoint_stage == "finetune" else CALIBRATED)

    def check_not_folded(self) -> None:
        """Raise InputError where `quest-deploy lora` made the checkpoint from another one's."""
        if "lora" in self.stages:
            raise InputError(f"{self.root}: {FOLDED} ({self.stages['lora'].options['base']})")

    def states(self) -> dict[str, str | None]:
        """Why each finished stage is not to be used, None where it is up to date, by the stage."""
        whole: set[str] = set()
        found: dict[str, str | None] = {}
        for stage in self.stages:
            try:
                self.require(stage, whole)
            except InputError as e:
                found[stage] = str(e)
            else:
                found[stage] = None
        return found

    def require(self, stage: str, whole: set[str] | None = None) -> StageRecord:
        """The record of a finished stage whose files are whole and up to date.

        Args:
            whole: stages whose files need not be read again; those that are found so join them.

        Raises:
            InputError: it has not run, one of its files was changed or removed, or what it was made
                from has changed since.
        """
        record = self.stages.get(stage)
        if record is None and stage == "calibrate":
            self.check_not_folded()
            if "import" in self.stages:
                raise InputError(IMPORTED_ALONE)
        if record is None:
            raise InputError(
                f"{self.root} has no finished `{_command(stage)}`: run `{self._hint(stage)}` first"
            )
        whole = set() if whole is None else whole
        for path in () if stage in whole else record.files:
            self._check_file(stage, path)
        whole.add(stage)
        again = f"run `{self._hint(stage)}` again"
        if self._precedes_checkpoint(stage):
            raise InputError(
                f"`{_command(stage)}` ran before `{self.checkpoint_stage}` made its checkpoint; "
                f"{again}"
            )
        # All of them first: where several are outdated, the first one must run again.
        digests = {x: self.require(x, whole).digest for x in record.inputs}
        for upstream, digest in record.inputs.items():
            if digests[upstream] != digest:
                raise InputError(
                    f"`{_command(stage)}` ran on an older result of `{_command(upstream)}`; {again}"
                )
        return record

    def require_recorded(self, stage: str, path: str) -> StageRecord:
        """As :meth:`require`, but of the files only ``path`` is read, which has the hashes of those
        that are used and whose reader checks them.
        """
        record = self.require(stage, set(self.stages))
        self._check_file(stage, path)
        return record

    def _check_file(self, stage: str, path: str) -> None:
        """Raise InputError where a file of a finished stage is missing or was changed."""
        entry = self.stages[stage].files.get(path)
        problem = "is not recorded" if entry is None else _problem(self.root / path, entry)
        if problem:
            raise InputError(f"{self.root / path} {problem}; run `{self._hint(stage)}` again")

    def fresh(
        self, stage: str, inputs: Iterable[str], options: dict[str, Any]
    ) -> StageRecord | None:
        """The record of ``stage`` if it need not run again: same inputs, same options, files
        whole.
        """
        record = self.stages.get(stage)
        if (
            record is None
            or record.options != options
            or record.made.get("quest-deploy") != __version__
        ):
            return None
        if record.inputs != {
            name: self.stages[name].digest for name in inputs if name in self.stages
        }:
            return None
        if any(_problem(self.root / path, entry) for path, entry in record.files.items()):
            return None
        return record

    def outdated_by(self, stage: str) -> list[str]:
        """The finished stages that are not to be used since ``stage`` has the result that it has
        now: those that ran on another one, and those that ran on theirs.
        """
        digest = self.stages[stage].digest
        found = {
            name
            for name, x in self.stages.items()
            if x.inputs.get(stage, digest) != digest
            or (stage == self.checkpoint_stage and self._precedes_checkpoint(name))
        }
        while more := {x for x in self.stages if found & self.stages[x].inputs.keys()} - found:
            found |= more
        return [name for name in self.stages if name in found]

    def _precedes_checkpoint(self, stage: str) -> bool:
        """Whether it ran on the calibrated checkpoint, before there was the one to be deployed."""
        inputs = self.stages[stage].inputs
        return (
            "calibrate" in inputs
            and stage not in READ_CALIBRATED
            and self.checkpoint_stage not in inputs
        )

    def start(self, stage: str, options: dict[str, Any]) -> None:
        """Keep the options of a stage that takes long, so that :meth:`options_of` knows them if it
        is interrupted.
        """
        write_json(self.path(STARTED.format(stage)), options)

    def forget_start(self, stage: str) -> None:
        """Forget what :meth:`start` kept."""
        self.path(STARTED.format(stage)).unlink(missing_ok=True)

    @property
    def interrupted_stages(self) -> list[str]:
        """The stages that were started and did not end."""
        before, after = STARTED.split("{}")
        return sorted(
            path.name.removeprefix(before).removesuffix(after)
            for path in self.root.glob(STARTED.format("*"))
        )

    def interrupted(self, stage: str) -> dict[str, Any] | None:
        """The options that ``stage`` was started with and did not end; None where it was not."""
        path = self.path(STARTED.format(stage))
        if not path.exists():
            return None
        options = read_json(
            path, repair=f"run `{self._hint(stage)}` with the options that you want"
        )
        return options if isinstance(options, dict) else None

    def options_of(self, stage: str) -> dict[str, Any]:
        """The options that ``stage`` was last started with, interrupted or not; empty if it never
        was.
        """
        if (options := self.interrupted(stage)) is not None:
            return options
        record = self.stages.get(stage)
        return {} if record is None else dict(record.options)

    def record(
        self,
        stage: str,
        *,
        inputs: Iterable[str],
        options: dict[str, Any],
        files: Iterable[Path],
        details: dict[str, Any],
    ) -> StageRecord:
        """Write into the manifest that ``stage`` finished, and move what it wrote under :meth:`new`
        to its place: all of that happens, or none, also if the process is killed.
        """
        staged = self.path(STAGED)
        entries = {
            p.relative_to(staged if p.is_relative_to(staged) else self.root).as_posix(): {
                "sha256": sha256_of(p),
                "bytes": p.stat().st_size,
            }
            for p in sorted(files)
        }
        made = {
            "quest-deploy": __version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **versions(),
        }
        record = StageRecord(
            {name: self.stages[name].digest for name in inputs}, options, entries, details, made
        )
        self.stages[stage] = record
        self._write(self.new(MANIFEST))
        sync_all(staged)
        os.replace(staged, self.path(CHANGES))
        sync(self.root)
        self._settle()
        return record

    def _settle(self) -> None:
        """Move what is in ``CHANGES`` to its place, the manifest last, and delete the files that
        only the manifest of before knew.
        """
        changes = self.path(CHANGES)
        if not (changes / MANIFEST).exists():  # the last file to leave
            shutil.rmtree(changes, ignore_errors=True)
            return
        after, before = (Workspace._read(self.root, f / MANIFEST) for f in (changes, self.root))
        for written in sorted(path for path in changes.rglob("*") if path.is_file()):
            place = self.root / written.relative_to(changes)
            if written != changes / MANIFEST:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(written, place)
        for name in before._files() - after._files():
            self.path(name).unlink(missing_ok=True)
        for folder in {self.path(name).parent for name in after._files()}:
            if folder.is_dir():
                sync(folder)
        os.replace(changes / MANIFEST, self.path(MANIFEST))
        sync(self.root)
        shutil.rmtree(changes, ignore_errors=True)

    def _files(self) -> set[str]:
        return {path for record in self.stages.values() for path in record.files}

    def _write(self, path: Path) -> None:
        stages = {name: asdict(record) for name, record in self.stages.items()}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "source": self.source.to_json(),
            "scheme": self.scheme.to_json(),
            "stages": stages,
        }
        write_json(path, sealed(content))

    def _hint(self, stage: str) -> str:
        command, _, backend = stage.partition("/")
        if stage == "lora" and (record := self.stages.get(stage)) is not None:
            given = " ".join(f"--lora {x['path']}:{x['weight']}" for x in record.options["loras"])
            return f"quest-deploy lora -w {record.options['base']} {given} --output {self.root}"
        return f"quest-deploy {command}{f' --backend {backend}' if backend else ''} -w {self.root}"


def versions() -> dict[str, str]:
    """The versions of Python, of this machine's platform and of the packages that shape results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _command(stage: str) -> str:
    command, _, backend = stage.partition("/")
    return f"{command} --backend {backend}" if backend else command


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"]:
        return (
            f"was changed since it was written (expected {entry['bytes']} bytes, found "
            f"{path.stat().st_size})"
        )
    if sha256_of(path) != entry["sha256"]:
        return "was changed since it was written (its SHA-256 is not the manifest's)"
    return None
