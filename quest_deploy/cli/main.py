"""The `quest-deploy` program: the commands, and how errors end."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from typing import Any, NoReturn, cast

import typer
from typer.rich_utils import rich_format_error

from quest_deploy import __version__
from quest_deploy.cli.benchmark import benchmark
from quest_deploy.cli.build_engine import build_engine_command
from quest_deploy.cli.calibrate import calibrate
from quest_deploy.cli.client import client
from quest_deploy.cli.console import messages
from quest_deploy.cli.doctor import doctor
from quest_deploy.cli.evaluate import evaluate
from quest_deploy.cli.export import export
from quest_deploy.cli.finetune import finetune
from quest_deploy.cli.generate import generate
from quest_deploy.cli.import_ import import_command
from quest_deploy.cli.inspect import inspect
from quest_deploy.cli.package import package
from quest_deploy.cli.reference import reference
from quest_deploy.cli.run import run
from quest_deploy.cli.schedule import schedule
from quest_deploy.cli.sensitivity import sensitivity
from quest_deploy.cli.verify import verify
from quest_deploy.errors import InputError, QuestDeployError

INTERRUPTED = 130
TORCH_EXTRA = frozenset(
    {
        "PIL",
        "accelerate",
        "diffusers",
        "huggingface_hub",
        "matplotlib",
        "onnxscript",
        "peft",
        "torch",
        "transformers",
        "yaml",
    }
)
"""What the extra `torch` installs, as it is imported: a machine that only runs engines has none."""

app = typer.Typer(
    help="From a diffusion model to QuEST-finetuned low-bit engines with one activation-scale set "
    "per timestep bucket.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(calibrate)
app.command()(sensitivity)
app.command()(finetune)
app.command("import")(import_command)
app.command()(export)
app.command()(reference)
app.command("build-engine")(build_engine_command)
app.command()(verify)
app.command()(benchmark)
app.command()(generate)
app.command()(evaluate)
app.command()(schedule)
app.command()(package)
app.command()(client)
app.command()(inspect)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    """From a diffusion model to QuEST-finetuned low-bit engines with one activation-scale set per
    timestep bucket.
    """
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the program; a user's mistake or a failed job ends in one message and exit code 2 or 1,
    never a traceback.
    """
    # Torch's threads that wait for each other keep their cores busy otherwise: next to other work,
    # ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        with messages():
            code = app(standalone_mode=False)
    except typer.TyperException as e:  # a usage error
        rich_format_error(cast(Any, e))
        _end(e.format_message(), e.exit_code)
    except QuestDeployError as e:
        _fail(str(e), e.exit_code)
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in TORCH_EXTRA:
            raise
        _fail(
            f"this command needs the Python package {package}, which is not installed: pip install "
            "'quest-deploy[torch]'",
            InputError.exit_code,
        )
    except BrokenPipeError:
        sys.exit(1)
    except OSError as e:
        reason = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        _fail(f"{reason}: {e.filename}" if e.filename else reason, 1)
    except MemoryError:
        _fail("out of memory", 1)
    if code == INTERRUPTED:
        _fail(
            "interrupted; what was finished is kept, and the same command goes on from there",
            INTERRUPTED,
        )
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    _end(message, code)


def _end(message: str, code: int) -> NoReturn:
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": code}))
    sys.exit(code)
