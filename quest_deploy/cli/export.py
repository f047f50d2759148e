"""`quest-deploy export`: the portable QDQ graph with one activation-scale set per timestep
bucket.
"""

from __future__ import annotations

from quest_deploy.cli.console import Console
from quest_deploy.cli.descriptions import report
from quest_deploy.cli.options import (
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
from quest_deploy.stages.workspaces import open_workspace


def export(
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
    as_json: JsonOption = False,
) -> None:
    """Export the checkpoint as a portable ONNX graph; calibrates one where there is none."""
    chosen, console = given(locals()), Console(as_json=as_json)
    api.export(**chosen, progress=console)
    report(console, open_workspace(workspace, model, bits), "export")
