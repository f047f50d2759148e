"""What this machine can build and run."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import versions
from quest_deploy.backends import cuda
from quest_deploy.backends.base import integer_instructions, processor_name, require_package
from quest_deploy.backends.cpu import CpuBackend
from quest_deploy.backends.options import PROVIDERS, EngineOptions
from quest_deploy.backends.registry import BACKENDS
from quest_deploy.errors import InputError, QuestDeployError

if TYPE_CHECKING:
    from collections.abc import Callable


def machine() -> dict[str, Any]:
    """This machine's processor, GPUs, free disk and versions; by backend (and onnxruntime's
    provider) why it cannot build or run, None where it can; and by CPU backend the largest weights
    that it multiplies exactly, by kernel, None where it does not run. And why there is no torch for
    what comes before the engines, None where there is.
    """
    backends = {}
    for name, backend in BACKENDS.items():
        for provider in PROVIDERS if name == "onnxruntime" else ("cpu",):
            options = EngineOptions(provider=provider)
            label = name if provider == "cpu" else f"{name} --provider {provider}"
            backends[label] = {
                "build": _problem(backend.check_build, options),
                "run": _problem(backend.check_run, options),
            }
    exact: dict[str, dict[str, int] | None] = {}
    for name, backend in BACKENDS.items():
        if not isinstance(backend, CpuBackend):
            continue
        exact[name] = None
        if backends[name]["run"] is None:
            try:
                exact[name] = dict(backend.exactness(EngineOptions()).levels)
            except QuestDeployError as e:  # its runtime refuses this processor
                backends[name]["run"] = str(e)
    return {
        "machine": {
            "processor": processor_name(),
            "integer_instructions": list(integer_instructions()),
            "gpus": cuda.gpu_count(),
            "free_disk_bytes": shutil.disk_usage(".").free,
            "versions": versions(),
        },
        "backends": backends,
        "exact_integers": exact,
        "torch": _problem(require_package, "torch", "torch", "all that comes before the engines"),
    }


def saturating(levels: dict[str, int]) -> dict[str, int]:
    """Those of a CPU backend's kernels that do not multiply every integer exactly."""
    from exporters.exactness import LEVELS  # imports onnx, which the program's help does not need

    return {kernel: level for kernel, level in levels.items() if level < LEVELS[0]}


def _problem(check: Callable[..., object], *arguments: object) -> str | None:
    try:
        check(*arguments)
    except InputError as e:
        return str(e)
    return None
