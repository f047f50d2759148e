"""`quest-deploy calibrate`: choose every scale from the FP32 model's own sampling trajectories
(PTQ).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import command
from quest_deploy.stages import api
from quest_deploy.stages.arguments import CalibrateArguments

if TYPE_CHECKING:
    from quest_deploy.cli.console import Console


@command(CalibrateArguments)
def calibrate(chosen: dict[str, Any], console: Console) -> None:
    """Quantize the FP32 model by calibration alone (PTQ), data-free; qdiff resumes where it was
    interrupted.
    """
    report(console, api.calibrate(**chosen, progress=console), "calibrate")
