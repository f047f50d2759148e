"""`quest-deploy calibrate`: choose every scale from the FP32 model's own sampling trajectories
(PTQ).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
    METHOD_HELP,
    AttentionBitsOption,
    BitsOption,
    BucketsOption,
    GranularityOption,
    JsonOption,
    LoraOption,
    ModelOption,
    RandomWeightsOption,
    RevisionOption,
    SoftmaxBitsOption,
    SplitShortcutsOption,
    WorkspaceOption,
    given,
)
from quest_deploy.stages import api
from quest_deploy.stages.options import CalibrateOptions

DEFAULTS = CalibrateOptions()


def calibrate(
    workspace: WorkspaceOption = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    random_weights: RandomWeightsOption = False,
    lora: LoraOption = None,
    bits: BitsOption = None,
    buckets: BucketsOption = None,
    granularity: GranularityOption = None,
    attention_bits: AttentionBitsOption = None,
    softmax_bits: SoftmaxBitsOption = None,
    split_shortcuts: SplitShortcutsOption = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = DEFAULTS.method,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samplings to record.", show_default="the model's")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="DDIM steps of each; more where that is needed to visit every bucket.",
            show_default="the model's",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows that run at once.", show_default="the model's")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance weight of the samplings; 1 is none.",
            show_default="the model's",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file with a prompt a line, for a text-to-image model.",
            show_default="a short list of ours",
        ),
    ] = None,
    reconstruction_samples: Annotated[
        int | None, typer.Option(min=1, help="qdiff: recorded samples it learns from.")
    ] = None,
    rounding_steps: Annotated[
        int | None, typer.Option(min=0, help="qdiff: steps a block that learn the rounding.")
    ] = None,
    scale_steps: Annotated[
        int | None,
        typer.Option(min=0, help="qdiff: steps a block that learn the activation scales."),
    ] = None,
    reconstruction_batch: Annotated[
        int | None, typer.Option(min=1, help="qdiff: samples a step.")
    ] = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Quantize the FP32 model by calibration alone (PTQ), data-free; qdiff resumes where it was
    interrupted.
    """
    chosen, console = given(locals()), Console(as_json=as_json)
    report(console, api.calibrate(**chosen, progress=console), "calibrate")
