"""All stages in order, skipping those whose inputs have not changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.options import EngineOptions
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.stages import (
    BENCHMARK,
    BUILD_ENGINE,
    CALIBRATE,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    REFERENCE_RECORDS,
    REPORT,
    VERIFY,
)
from quest_deploy.stages.options import CalibrateOptions, RecordsOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.progress import Display, Progress
    from quest_deploy.stages.options import ExportOptions, ReferenceOptions, StageOptions
    from quest_deploy.stages.results import Verification
    from quest_deploy.stages.stage import Stage

    AnyStage = Stage[Any, Any]

OF_CHECKPOINT: tuple[AnyStage, ...] = (CALIBRATE, FINETUNE)
OF_MODEL: tuple[AnyStage, ...] = (EXPORT, REFERENCE_RECORDS)
OF_BUILT: tuple[AnyStage, ...] = (BUILD_ENGINE,)
OF_VERIFIED: tuple[AnyStage, ...] = (VERIFY, BENCHMARK)
OF_FIRST_PASSED: tuple[AnyStage, ...] = (GENERATE, EVALUATE)
"""The stages in order: of the checkpoint, of the model, of each backend to build for, of each to
verify, and of the first that passes.
"""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backends:
    """The backends of a run.

    Attributes:
        verified: to verify and benchmark; built too.
        built: to build for.
        left_out: why this machine cannot take the others, by name.
    """

    verified: tuple[str, ...]
    built: tuple[str, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        results: of each stage, by its name and its backend's.
        failed: why a backend's engine was not built or does not pass its verification.
    """

    workspace: Workspace
    backends: Backends
    results: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> list[str]:
        """The backends whose engines passed their verification, in order."""
        return [name for name in self.backends.verified if name not in self.failed]


def available(
    verified: Iterable[str], build_only: Iterable[str], *, if_available: bool
) -> Backends:
    """The backends that this machine has; raise InputError where it lacks one, or all
    ``if_available``, and for an unknown name.
    """
    left_out: dict[str, str] = {}

    def here(names: Iterable[str], *, runs: bool) -> Iterator[str]:
        for name in dict.fromkeys(names):
            backend = get_backend(name)
            try:
                backend.check_build(EngineOptions())
                if runs:
                    backend.check_run(EngineOptions())
            except InputError as e:
                if not if_available:
                    raise
                left_out[name] = str(e)
            else:
                yield name

    run = tuple(here(verified, runs=True))
    built = tuple(here([*run, *build_only], runs=False))
    if not run:
        raise InputError(
            f"this machine has none of the backends to verify: {'; '.join(left_out.values())}"
        )
    return Backends(run, built, left_out)


def run(
    workspace: Workspace,
    backends: Backends,
    options: Mapping[str, StageOptions],
    progress: Progress | Display,
    on_result: Callable[[Workspace, str, Any], None],
) -> Run:
    """Run all stages.

    A backend that cannot build its engine, or whose engine fails its verification, stops there;
    the others go on.

    Args:
        options: of stages, by their names, that are not to run with their defaults.
        on_result: called after each stage, with its name and its backend's, and its result.
    """
    ended = Run(workspace, backends)

    def go(stage: AnyStage, backend: str | None = None) -> Any:
        chosen = options.get(stage.name) or stage.options()
        if backend is not None:
            chosen = replace(chosen, backend=backend)
        result = stage.run(workspace, chosen, progress, reuse=True)
        name = f"{stage.name} {backend}" if backend else stage.name
        ended.results[name] = result
        on_result(workspace, name, result)
        return result

    def go_through(stages: tuple[AnyStage, ...], backend: str) -> None:
        for stage in stages:
            try:
                result = go(stage, backend)
            except InputError:
                raise  # of the workspace or its options, and so of every backend
            except QuestDeployError as e:
                ended.failed[backend] = f"{stage.name} --backend {backend}: {e}"
                return
            if stage is VERIFY and not result["passed"]:
                ended.failed[backend] = failure(result)
                return

    # LoRAs are folded into a checkpoint that another workspace made.
    for stage in OF_MODEL if "lora" in workspace.stages else OF_CHECKPOINT + OF_MODEL:
        go(stage)
    for backend in backends.built:
        go_through(OF_BUILT, backend)
    for backend in backends.verified:
        if backend not in ended.failed:
            go_through(OF_VERIFIED, backend)
    if workspace.source.random_weights:
        logger.info("generate, evaluate: left out, random weights draw nothing")
    elif not ended.passed:
        logger.info("generate, evaluate: left out, no engine passed its verification")
    else:
        for stage in OF_FIRST_PASSED:
            go(stage, ended.passed[0])
    go(REPORT)
    return ended


def failure(result: Verification) -> str:
    """Return what a failed verification comes down to: its first problem."""
    return (
        f"the {result['backend']} engine does not compute the fake-quantized model: "
        f"{result['problems'][0]}"
    )


def kept(stage: Stage[Any, Any], workspace: Workspace, given: Mapping[str, Any]) -> Any:
    """The options that the workspace's stage ran with or was started with, if it was, but for those
    that are given; see :func:`exported`.
    """
    own = exported(workspace) if stage is EXPORT else workspace.options_of(stage.name)
    try:
        return stage.options.from_json(own | dict(given))
    except InputError as e:
        raise InputError(f"{workspace.root}: {e}; run `quest-deploy {stage.name}`") from e


def exported(workspace: Workspace) -> dict[str, Any]:
    """The options that the workspace was exported with; until it is, those of the workspace that
    ``lora`` made it from.
    """
    folded = workspace.options_of("lora").get("export", {})
    return workspace.options_of(EXPORT.name) if EXPORT.name in workspace.stages else folded


def as_exported(workspace: Workspace, options: ReferenceOptions) -> RecordsOptions:
    """``options`` with the inputs of the exported graph."""
    found: ExportOptions = kept(EXPORT, workspace, {})
    return RecordsOptions(**vars(options), **vars(found))


def calibration(
    workspace: Workspace, given: Mapping[str, Any], method: str | None
) -> CalibrateOptions:
    """The options that the workspace was calibrated with, but for those that are given; another
    method's reconstruction is not kept.
    """
    if method not in (None, workspace.options_of("calibrate").get("method")):
        given = {**given, "method": method, "reconstruction": {}}
    options: CalibrateOptions = kept(CALIBRATE, workspace, given)
    return options
