"""The `quest-deploy` program: the commands, and how errors end."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from typing import Any, NoReturn, cast

import typer
from typer.rich_utils import rich_format_error

from quest_deploy import __version__
from quest_deploy.cli.benchmark import benchmark
from quest_deploy.cli.build_engine import build_engine_command
from quest_deploy.cli.build_parts import build_parts
from quest_deploy.cli.calibrate import calibrate
from quest_deploy.cli.client import client
from quest_deploy.cli.console import discard_output, messages
from quest_deploy.cli.doctor import doctor
from quest_deploy.cli.evaluate import evaluate
from quest_deploy.cli.export import export
from quest_deploy.cli.export_parts import export_parts
from quest_deploy.cli.finetune import finetune
from quest_deploy.cli.generate import generate
from quest_deploy.cli.import_ import import_command
from quest_deploy.cli.inspect import inspect
from quest_deploy.cli.interruptions import INTERRUPTED, MESSAGE, raised
from quest_deploy.cli.lora import lora
from quest_deploy.cli.package import package
from quest_deploy.cli.reference import reference
from quest_deploy.cli.report import report
from quest_deploy.cli.run import run
from quest_deploy.cli.schedule import schedule
from quest_deploy.cli.sensitivity import sensitivity
from quest_deploy.cli.verify import verify
from quest_deploy.errors import InputError, QuestDeployError
from quest_deploy.files import TEMPORARY_PREFIX

TORCH_EXTRA = frozenset(
    {
        "PIL",
        "accelerate",
        "diffusers",
        "huggingface_hub",
        "matplotlib",
        "onnxscript",
        "torch",
        "torchmetrics",
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
app.command()(lora)
app.command()(export)
app.command()(reference)
app.command("build-engine")(build_engine_command)
app.command("export-parts")(export_parts)
app.command("build-parts")(build_parts)
app.command()(verify)
app.command()(benchmark)
app.command()(generate)
app.command()(evaluate)
app.command()(report)
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
    _open_standard_streams()
    try:
        with raised() as interruption, messages():
            try:
                code = app(standalone_mode=False)
                sys.stdout.flush()  # a full disk is told here, not by the interpreter's last words
            except Exception:
                if not interruption.came:
                    raise
                code = INTERRUPTED  # which a library has turned into another exception
    except KeyboardInterrupt:  # after the app's own watch
        code = INTERRUPTED
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
        discard_output()
        sys.exit(1)
    except OSError as e:
        reason = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        # What the user knows is the file, not what it is called until it is whole.
        name = re.sub(rf"{re.escape(TEMPORARY_PREFIX)}(\d+-|staged/)", "", str(e.filename))
        _fail(f"{reason}: {name}" if e.filename else reason, 1)
    except MemoryError:
        _fail("out of memory", 1)
    if code == INTERRUPTED:
        _fail(MESSAGE, INTERRUPTED)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Have all three open: a file that is opened where one was closed would take its number, and
    what a library prints. A name that is no UTF-8 is printed with its bytes escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    _end(message, code)


def _end(message: str, code: int) -> NoReturn:
    if "--json" in sys.argv:
        try:
            print(json.dumps({"error": message, "exit_code": code}), flush=True)
        except OSError:  # whatever filled standard output
            discard_output()
    sys.exit(code)
