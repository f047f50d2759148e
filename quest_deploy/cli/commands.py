"""The commands that make something of a model, a workspace or a package: options in, a function of
``api.py`` called, text out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from quest_deploy.cli.descriptions import describe, report_page, show_result, summary
from quest_deploy.cli.options import command, opened
from quest_deploy.files import size
from quest_deploy.stages import api
from quest_deploy.stages.arguments import (
    BenchmarkArguments,
    BuildEngineArguments,
    BuildPartsArguments,
    CalibrateArguments,
    ClientArguments,
    EvaluateArguments,
    ExportArguments,
    ExportPartsArguments,
    FinetuneArguments,
    GenerateArguments,
    ImportArguments,
    LoraArguments,
    PackageArguments,
    ReferenceArguments,
    ReportArguments,
    RunArguments,
    ScheduleArguments,
    SensitivityArguments,
    VerifyArguments,
)
from quest_deploy.stages.run import failure

if TYPE_CHECKING:
    from quest_deploy.artifacts.workspace import Workspace
    from quest_deploy.cli.console import Console


@command(RunArguments)
def run(chosen: dict[str, Any], console: Console) -> None:
    """Go from the FP32 model to verified, benchmarked engines and a picture; goes on where it was
    interrupted.

    What was calibrated or finetuned with options of its own keeps them. An engine that fails its
    verification is neither benchmarked nor drawn with; the others are, and the exit code is 1.
    """

    def show(opened: Workspace, stage: str, details: Any) -> None:
        if not console.as_json:
            print(f"\n== {stage}\n{describe(opened, stage.replace(' ', '/'))}", flush=True)

    ended = api.run(**chosen, on_result=show, progress=console)
    results = {
        "workspace": str(ended.workspace.root),
        "left_out": ended.backends.left_out,
        "failed": ended.failed,
        **ended.results,
    }
    console.result(results, "", "== summary", summary(ended))
    if ended.failed:
        # After the result, which --json keeps one value.
        console.note(f"error: {'; '.join(ended.failed.values())}")
        raise typer.Exit(1)


@command(CalibrateArguments)
def calibrate(chosen: dict[str, Any], console: Console) -> None:
    """Quantize the FP32 model by calibration alone (PTQ), data-free; qdiff resumes where it was
    interrupted.
    """
    show_result(console, api.calibrate(**chosen, progress=console), "calibrate")


@command(SensitivityArguments)
def sensitivity(chosen: dict[str, Any], console: Console) -> None:
    """Measure how much each layer hurts when it alone is quantized, and pick the layers for stage 2
    of finetuning.
    """
    api.sensitivity(**chosen, progress=console)
    show_result(console, opened(chosen), "sensitivity")


@command(FinetuneArguments)
def finetune(chosen: dict[str, Any], console: Console) -> None:
    """Finetune the calibrated model with QuEST; resumes where it was interrupted. Several
    processes: `accelerate launch`.
    """
    if api.finetune(**chosen, progress=console) is not None:  # else another process prints
        show_result(console, opened(chosen), "finetune")


@command(ImportArguments)
def import_command(chosen: dict[str, Any], console: Console) -> None:
    """Import a checkpoint of the official QuEST or Q-Diffusion code: the same results, in a
    workspace to export from.

    What the file does not say must be given; nothing is guessed.
    """
    show_result(console, api.import_checkpoint(**chosen, progress=console), "import")


@command(LoraArguments)
def lora(chosen: dict[str, Any], console: Console) -> None:
    """Fold LoRAs into the integer weights of a workspace's checkpoint, as a new workspace; the
    activation scales stay, so that nothing is calibrated or finetuned again.
    """
    show_result(console, api.lora(**chosen, progress=console), "lora")


@command(ExportArguments)
def export(chosen: dict[str, Any], console: Console) -> None:
    """Export the checkpoint as a portable ONNX graph; calibrates one where there is none. A
    workspace that is given alone must be there.
    """
    api.export(**chosen, progress=console)
    show_result(console, opened(chosen), "export")


@command(ReferenceArguments)
def reference(chosen: dict[str, Any], console: Console) -> None:
    """Save the fake-quantized torch model's inputs and outputs, per layer and end to end, for every
    bucket.
    """
    api.reference(**chosen, progress=console)
    show_result(console, opened(chosen), "reference")


@command(BuildEngineArguments)
def build_engine(chosen: dict[str, Any], console: Console) -> None:
    """Build an engine from the exported graph."""
    api.build_engine(**chosen, progress=console)
    show_result(console, opened(chosen), "build-engine", chosen["backend"])


@command(ExportPartsArguments)
def export_parts(chosen: dict[str, Any], console: Console) -> None:
    """Export text encoders and VAE as graphs."""
    api.export_parts(**chosen, progress=console)
    show_result(console, opened(chosen), "export-parts")


@command(BuildPartsArguments)
def build_parts(chosen: dict[str, Any], console: Console) -> None:
    """Build engines of the exported parts, which load_pipeline and generate then use."""
    api.build_parts(**chosen, progress=console)
    show_result(console, opened(chosen), "build-parts", chosen["backend"])


@command(VerifyArguments)
def verify(chosen: dict[str, Any], console: Console) -> None:
    """Verify an engine against the fake-quantized model; exit code 1 if it differs."""
    result = api.verify(**chosen, progress=console)
    show_result(console, opened(chosen), "verify", chosen["backend"])
    if not result["passed"]:
        # Beside the report, which --json keeps the only value on standard output.
        console.note(f"error: {failure(result)}")
        raise typer.Exit(1)


@command(BenchmarkArguments)
def benchmark(chosen: dict[str, Any], console: Console) -> None:
    """Time the engine against FP32 and against static scales, on the same backend."""
    api.benchmark(**chosen, progress=console)
    show_result(console, opened(chosen), "benchmark", chosen["backend"])


@command(GenerateArguments)
def generate(chosen: dict[str, Any], console: Console) -> None:
    """Draw PNG pictures with the engine."""
    api.generate(**chosen, progress=console)
    show_result(console, opened(chosen), "generate", chosen["backend"])


@command(EvaluateArguments)
def evaluate(chosen: dict[str, Any], console: Console) -> None:
    """Judge FP32, the fake-quantized models and the engine: how near their images come
    to FP32's, and how well the embedded model's show what they were asked for.
    """
    api.evaluate(**chosen, progress=console)
    show_result(console, opened(chosen), "evaluate", chosen["backend"])


@command(ReportArguments)
def report(chosen: dict[str, Any], console: Console) -> None:
    """Write a page that shows the workspace: one HTML file with its images, the verification layer
    by layer, activation ranges over time, speed, sizes, and the provenance of every file.
    """
    details = api.report(**chosen, progress=console)
    root = opened(chosen).root
    console.result({"workspace": str(root), **details}, report_page(details))


@command(ScheduleArguments)
def schedule(chosen: dict[str, Any], console: Console) -> None:
    """Write a scheduler's steps as a table, which the C++ runtime denoises by."""
    details = api.schedule(**chosen)
    noise = ", with fresh noise at each step" if details["noise"] else ""
    console.result(
        {"workspace": str(opened(chosen).root), **details},
        f"{details['schedule']}: {details['steps']} calls of the model, as {details['scheduler']} "
        f"makes them{noise}",
    )


@command(PackageArguments)
def package(chosen: dict[str, Any], console: Console) -> None:
    """Write a package that serves the model: a model repository for Triton Inference Server."""
    details = api.package(**chosen, progress=console)
    models = ", ".join([*details["models"], "pipeline", "pipeline_stream"])
    serve = "python serve.py" if details["plan"] else "python serve.py --cpu"
    console.result(
        {"workspace": str(opened(chosen).root), "triton": str(chosen["triton"]), **details},
        f"{chosen['triton']} ({size(details['bytes'])}): {models}",
        f"serve it with `{serve}` there, see README.md",
    )


@command(ClientArguments)
def client(chosen: dict[str, Any], console: Console) -> None:
    """Ask a server started by a package's serve.py for an image; Ctrl-C cancels it there too."""
    drawn = api.client(**chosen, progress=console)
    console.result({**drawn}, f"{drawn['picture']}: seed {drawn['seed']}, {drawn['seconds']:.2f} s")
