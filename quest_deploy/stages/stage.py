"""What a stage is, and how every stage runs: what it reads is checked, it is skipped where nothing
changed, and recorded in the manifest when it is done.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from quest_deploy.errors import InputError
from quest_deploy.files import check_text, naming
from quest_deploy.progress import no_progress, progress_of
from quest_deploy.stages.options import EngineStageOptions, StageOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Display, Progress

Options = TypeVar("Options", bound=StageOptions)
Result = TypeVar("Result")

DEPLOYED = "the checkpoint to be deployed"
"""Stands, in what a stage reads, for the stages that made that checkpoint: finetune, import, lora
or calibrate.
"""
FINISHED = "all that is up to date"
"""Stands, in what a stage reads, for every other stage that has finished and is up to date."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage(Generic[Options, Result]):
    """A step on the way from the model to its reports.

    Its module, which is imported when it runs since it may need torch, defines
    ``work(workspace, options, progress)``, which writes the stage's files and returns them with its
    result.

    Attributes:
        name: what its command is called, and the manifest, which adds the backend where the stage
            is about one backend's engine.
        options: the class of its options.
        reads: the stages whose files it reads (of the same backend, where they are about an
            engine), or ``DEPLOYED``, or ``FINISHED``. Each must be finished and up to date.
        writes: glob patterns of the files that it writes, in the workspace.
        state: what lets it go on where it was interrupted: files and folders in the workspace, gone
            when it is done.
        alone: whether `quest-deploy run` leaves out what reads it.
        long: whether it may take hours: its options are kept from its start, so that
            ``quest-deploy run`` goes on with them after an interruption.
    """

    name: str
    options: type[Options]
    reads: tuple[Stage[Any, Any] | str, ...] = ()
    writes: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    alone: bool = False
    long: bool = False

    @property
    def of_engine(self) -> bool:
        """Whether it is about one backend's engine."""
        return issubclass(self.options, EngineStageOptions)

    @property
    def module(self) -> Any:
        """The module that does its work."""
        name = {"import": "import_"}.get(self.name, self.name.replace("-", "_"))
        return importlib.import_module(f"quest_deploy.stages.{name}")

    def recorded_name(self, backend: str | None = None) -> str:
        """Return what the manifest calls it."""
        return f"{self.name}/{backend}" if self.of_engine else self.name

    def inputs(self, workspace: Workspace, backend: str | None = None) -> list[str]:
        """The stages that it reads in ``workspace``, as the manifest calls them."""
        names: list[str] = []
        for stage in self.reads:
            if isinstance(stage, Stage):
                names.append(stage.recorded_name(backend))
            elif stage == FINISHED:
                states = workspace.states()
                names += [name for name, why in states.items() if why is None and name != self.name]
            else:
                names += workspace.checkpoint_inputs
        return names

    def run(
        self,
        workspace: Workspace,
        options: Options,
        progress: Progress | Display = no_progress,
        *,
        reuse: bool = False,
        work: Callable[[Workspace, Options, Progress], tuple[Iterable[Path], Result]] | None = None,
    ) -> Result:
        """Run it, record it and return its result.

        Args:
            reuse: return the recorded result where it has run with the same inputs and options.
            work: what to do instead of its module's ``work``.

        Raises:
            InputError: this machine lacks what it needs, or a stage that it reads is not finished
                or not up to date.
        """
        options.check_machine()
        backend = getattr(options, "backend", None)
        name, recorded = self.recorded_name(backend), as_recorded(options)
        with workspace.locked():
            inputs = self.inputs(workspace, backend) + options.further_inputs(workspace)
            whole: set[str] = set()
            for upstream in inputs:
                workspace.require(upstream, whole)
            record = workspace.fresh(name, inputs, recorded) if reuse else None
            if record is not None:
                logger.info("%s: up to date", name)
                return cast("Result", record.details)
            interrupted = workspace.interrupted(name) if self.long else None
            if self.long:
                _warn_of_others(name, interrupted or recorded, recorded)
                workspace.start(name, recorded)
            try:
                with (
                    naming(workspace.root),
                    progress_of(progress, name) as shown,
                    _scratch_in(workspace.new("scratch")),
                ):
                    files, result = (work or self.module.work)(workspace, options, shown)
            except Exception as e:  # but an interruption is none
                workspace.forget_start(name)
                if interrupted is not None and isinstance(e, InputError):
                    workspace.start(name, interrupted)  # the user mends it, and goes on
                workspace.discard_if_unused()
                raise
            details = cast("dict[str, Any]", result)
            workspace.record(name, inputs=inputs, options=recorded, files=files, details=details)
            workspace.forget_start(name)
            if outdated := workspace.outdated_by(name):
                repair = "" if self.alone else f"; `quest-deploy run -w {workspace.root}` does so"
                listed = ", ".join(outdated)
                logger.warning("outdated by this, and to be run again: %s%s", listed, repair)
            for left in self.state:
                workspace.remove(left)
            return cast("Result", result)


def _warn_of_others(name: str, interrupted: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Say where the options are not those that were interrupted."""
    others = [
        f"{option} {interrupted.get(option)}, now {chosen.get(option)}"
        for option in sorted(interrupted.keys() | chosen.keys())
        if interrupted.get(option) != chosen.get(option)
    ]
    if others:
        logger.warning(
            "the interrupted %s had other options, and `quest-deploy run` goes on with the new "
            "ones: %s",
            name,
            "; ".join(others),
        )


@contextmanager
def _scratch_in(folder: Path) -> Iterator[None]:
    """Have temporary files lie in ``folder``, where the next command clears away what a killed one
    leaves.
    """
    folder.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def as_recorded(options: StageOptions) -> dict[str, Any]:
    """The options as the manifest gives them back: a tuple becomes a list. Raise InputError where
    it could not give them back.
    """
    recorded: dict[str, Any] = json.loads(json.dumps(options.to_json()))
    check_text(recorded, "options")
    return recorded
