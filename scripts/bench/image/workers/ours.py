"""Ours: the engines of a workspace, in `quest_deploy.load_pipeline`."""

from __future__ import annotations

from typing import Any

import quest_deploy
from scripts.bench.image.workers.in_diffusers import opened_by
from scripts.bench.image.workers.measuring import main


def load(request: dict[str, Any]) -> Any:
    """The pipeline of the workspace "folder"."""
    return quest_deploy.load_pipeline(request["folder"], "openvino")


if __name__ == "__main__":
    main(opened_by(load), ("openvino", "diffusers", "torch"))
