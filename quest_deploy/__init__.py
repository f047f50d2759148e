"""quest-deploy: QuEST-finetuned diffusion models, from PyTorch to production engines.

>>> import quest_deploy as qd                                               # doctest: +SKIP
>>> workspace = qd.calibrate("sd15", bits="w4a4")
>>> qd.finetune(workspace)
>>> qd.export(workspace)
>>> qd.reference(workspace)
>>> qd.build_engine(workspace, backend="openvino")
>>> qd.verify(workspace, backend="openvino")["passed"]
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quest_deploy.artifacts.scheme import Granularity, Scheme
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.errors import InputError, QuestDeployError
    from quest_deploy.progress import Progress
    from quest_deploy.serving.pipeline import load_pipeline
    from quest_deploy.stages.api import (
        benchmark,
        build_engine,
        build_parts,
        calibrate,
        client,
        doctor,
        evaluate,
        export,
        export_parts,
        finetune,
        generate,
        import_checkpoint,
        inspect,
        lora,
        package,
        reference,
        report,
        run,
        schedule,
        sensitivity,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "Granularity",
    "InputError",
    "Progress",
    "QuestDeployError",
    "Scheme",
    "Workspace",
    "__version__",
    "benchmark",
    "build_engine",
    "build_parts",
    "calibrate",
    "client",
    "doctor",
    "evaluate",
    "export",
    "export_parts",
    "finetune",
    "generate",
    "import_checkpoint",
    "inspect",
    "load_pipeline",
    "lora",
    "package",
    "reference",
    "report",
    "run",
    "schedule",
    "sensitivity",
    "verify",
]
_ELSEWHERE = {
    "Granularity": "artifacts.scheme",
    "InputError": "errors",
    "Progress": "progress",
    "QuestDeployError": "errors",
    "Scheme": "artifacts.scheme",
    "Workspace": "artifacts.workspace",
    "load_pipeline": "serving.pipeline",
}
"""Where the names are that are not in ``stages.api``."""


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: some of it needs torch, and the program's help does not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'stages.api')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
