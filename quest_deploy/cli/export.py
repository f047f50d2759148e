"""`quest-deploy export`: the portable QDQ graph with one activation-scale set per timestep
bucket.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.workspace import GRAPH, TRAJECTORIES
from quest_deploy.cli.calibrate import CalibrateOptions, calibrate_stage, method_name
from quest_deploy.cli.console import Console, in_float, size
from quest_deploy.cli.options import (
    AttentionBitsOption,
    BitsOption,
    BucketsOption,
    GranularityOption,
    JsonOption,
    LoraOption,
    ModelChoices,
    ModelOption,
    RandomWeightsOption,
    RevisionOption,
    SchemeChoices,
    SoftmaxBitsOption,
    SplitShortcutsOption,
    WorkspaceOption,
    create_workspace,
)
from quest_deploy.cli.stage import run_stage
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import atomic_files, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Update


def export_stage(workspace: Workspace, console: Console, *, reuse: bool = False) -> dict[str, Any]:
    """Export the checkpoint, calibrating one first where there is none; writes unet.onnx and
    unet.onnx.data.
    """
    if workspace.checkpoint_stage == "calibrate":
        method = method_name(workspace)
        console.warn(
            f"no finetuned checkpoint in this workspace: exporting a calibrated one ({method}), "
            "which is less accurate"
        )
        if "calibrate" not in workspace.stages:
            calibrate_stage(workspace, console, CalibrateOptions())

    def work(update: Update) -> tuple[Iterable[Path], dict[str, Any]]:
        import onnx
        from onnx_ir.passes import InvariantError, PassError

        from exporters.graph_info import save_graph
        from exporters.torch_to_qdq import portable_graph
        from quest_deploy.artifacts.checkpoint import load_checkpoint
        from quest_deploy.calibration.trajectories import Trajectories

        checkpoint = load_checkpoint(workspace.checkpoint_path)
        example = next(Trajectories.load(workspace.path(TRAJECTORIES)).batches(2))
        update("tracing the model", 0, 2)
        try:
            graph = portable_graph(checkpoint, example, sha256_of(workspace.checkpoint_path))
        except (PassError, InvariantError) as e:
            raise QuestDeployError(
                f"{workspace.checkpoint_path} cannot be exported: {e}; make it again, with another "
                "scheme"
            ) from e
        update("checking the graph", 1, 2)
        with atomic_files(workspace.root, last=GRAPH) as folder:
            save_graph(graph, folder / GRAPH)
            onnx.checker.check_model(str(folder / GRAPH), full_check=True)
        update("checking the graph", 2, 2)
        files = [workspace.path(GRAPH), workspace.path(f"{GRAPH}.data")]
        details = {
            "method": checkpoint.provenance["method"],
            "sites": len(checkpoint.sites),
            "float_sites": checkpoint.float_sites,
            "layers": len(checkpoint.layers),
            "buckets": checkpoint.scheme.buckets,
            "bytes": sum(file.stat().st_size for file in files),
            "fp32_weight_bytes": 4
            * sum(layer.weight_codes.size for layer in checkpoint.layers.values()),
        }
        return files, details

    return run_stage(
        workspace,
        console,
        "export",
        inputs=workspace.checkpoint_inputs,
        options={},
        reuse=reuse,
        work=work,
    )


def describe(workspace: Workspace, details: dict[str, Any]) -> str:
    """The details in words."""
    weights = size(details["fp32_weight_bytes"])
    return "\n".join(
        [
            f"{workspace.path(GRAPH)} ({size(details['bytes'])}; the layers' weights alone are "
            f"{weights} in FP32)",
            f"method {details['method']}, {details['layers']} layers, "
            f"{details['sites']} quantized tensors with {details['buckets']} scales each",
            *in_float(
                details.get("float_sites", {}), details["sites"]
            ),  # records of earlier versions have none
        ]
    )


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
    console = Console(as_json=as_json)
    choices = SchemeChoices(
        bits, buckets, granularity, attention_bits, softmax_bits, split_shortcuts
    )
    opened = create_workspace(
        workspace, ModelChoices(model, revision, random_weights, tuple(lora or ())), choices
    )
    details = export_stage(opened, console)
    console.result({"workspace": str(opened.root), **details}, describe(opened, details))
