"""quest-deploy: QuEST-finetuned diffusion models, from PyTorch to production engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quest_deploy.serving.pipeline import load_pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load_pipeline"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: it needs torch and diffusers, and the program's help does not.
    if name == "load_pipeline":
        from quest_deploy.serving.pipeline import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
