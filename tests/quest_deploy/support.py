"""What the tests of the pipeline share: the program in-process, strict JSON, and changes to graphs.
Import by its full name.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from PIL import Image

from quest_deploy.artifacts.checkpoint import pack_int4
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.cli.main import main
from tests.helpers import assert_holds

MINI_UNET = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
"""27 layers that read 22 quantizers: resnets, attention, GEGLU, skips; it is cut into 50 parts and
built in seconds.
"""
MINI_EMOJI_UNET = {
    **MINI_UNET,
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (32,),
    "cross_attention_dim": 128,
}
"""The same with the embedded model's inputs and outputs, and so wide that a graph's weights have a
file of their own.
"""
CHAIN = {
    "calibrate": ["--bits", "w4a4", "--samples", "8", "--buckets", "3"],
    "sensitivity": ["--samples", "1", "--batch", "20"],
    "finetune": ["--temporal-steps", "2", "--sensitive-steps", "3", "--batch", "4"],
    "export": [],
    "reference": [],
    "build-engine openvino": [],
    "build-engine onnxruntime": [],
    "build-engine tensorrt-rtx": ["--compute-capability", "89"],
    "verify onnxruntime": [],
    "benchmark onnxruntime": ["--runs", "2", "--warmup", "1", "--batch", "2"],
    "generate openvino": ["--steps", "3", "--rows", "2", "--prompt", "cat", "--prompt", "fly"],
    "evaluate onnxruntime": ["--images", "4", "--steps", "3"],
    "report": [],
    "schedule": ["--scheduler", "unipc", "--steps", "6"],
}
"""The commands of the main job in order, with their options; a backend's name stands for --backend.
"""
STAGES = tuple(step.replace(" ", "/") for step in CHAIN if step != "schedule")
"""The chain's commands that finish a stage; a schedule is only a file."""
LDM_CHAIN = {
    "calibrate": ["--bits", "w4a4", "--samples", "2", "--steps", "3", "--buckets", "3"],
    "finetune": ["--temporal-steps", "1", "--sensitive-steps", "1", "--batch", "2"],
    "export": [],
    "reference": [],
    "build-engine openvino": ["--threads", "1"],
    "verify openvino": [],
    "benchmark openvino": ["--runs", "1", "--warmup", "0", "--batch", "2", "--no-static"],
    "generate openvino": ["--steps", "2", "--rows", "2"],
    "evaluate openvino": ["--images", "2", "--steps", "2"],
}
"""The same for a latent-diffusion pipeline, whose images nothing can judge."""
LABEL_CHAIN = {
    **{step: LDM_CHAIN[step] for step in ("calibrate", "export", "reference")},
    "build-engine onnxruntime": ["--threads", "1"],
    "build-engine tensorrt-rtx": CHAIN["build-engine tensorrt-rtx"],
    "generate onnxruntime": ["--labels", "30", "--steps", "2", "--rows", "1"],
}
"""What a package of a class-conditional model on pixels needs, whose only engine is its UNet's."""
TEXT_CHAIN = {
    **{step: LDM_CHAIN[step] for step in ("calibrate", "finetune", "export", "reference")},
    "build-engine onnxruntime": ["--threads", "1"],
    "verify onnxruntime": [],
    "benchmark onnxruntime": LDM_CHAIN["benchmark openvino"],
    "generate onnxruntime": [
        *("--prompt", "a red cat", "--negative-prompt", "blue", "--steps", "2", "--rows", "2"),
    ],
    "evaluate onnxruntime": ["--images", "2", "--steps", "2"],
}
"""And for a text-to-image pipeline."""
PIXART_CHAIN = {
    "calibrate": [*TEXT_CHAIN["calibrate"], "--attention-bits", "8", "--softmax-bits", "8"],
    "sensitivity": ["--samples", "1"],
    **{step: TEXT_CHAIN[step] for step in ("finetune", "export", "reference")},
    "build-engine onnxruntime": ["--threads", "1"],
    "build-engine openvino": ["--threads", "1"],
    "build-engine tensorrt-rtx": [*CHAIN["build-engine tensorrt-rtx"], "--dtype", "fp16"],
    "verify onnxruntime": [],
    "verify openvino": [],
    "benchmark onnxruntime": [
        *LDM_CHAIN["benchmark openvino"],
        *("--pipeline", "--images", "1", "--draws", "1"),
    ],
    "generate onnxruntime": TEXT_CHAIN["generate onnxruntime"],
    "evaluate onnxruntime": TEXT_CHAIN["evaluate onnxruntime"],
    "report": [],
    "schedule": CHAIN["schedule"],
}
"""And for one whose network is a transformer."""
SD3_CHAIN = {
    **PIXART_CHAIN,
    "calibrate": [
        *("--bits", "w4a8", "--samples", "1", "--steps", "4", "--buckets", "4"),
        *("--attention-bits", "8", "--softmax-bits", "8"),
    ],
    "benchmark onnxruntime": TEXT_CHAIN["benchmark onnxruntime"],
    "finetune": [*LDM_CHAIN["finetune"], "--gradient-checkpointing"],
    "generate openvino": [
        *("--prompt", "a red cat", "--steps", "2", "--height", "16", "--width", "24"),
    ],
    "schedule": ["--scheduler", "euler", "--steps", "4"],
}
"""And of flow matching."""
FLUX_CHAIN = {
    **SD3_CHAIN,
    "generate onnxruntime": [*("--prompt", "a red cat", "--steps", "2", "--guidance", "5")],
}
"""And whose guidance is embedded."""


@contextmanager
def in_this_process() -> Iterator[None]:
    """Benchmarks measure memory in this process: a new one for each engine takes ten times as long
    as the rest, and what is measured is too much.
    """
    modules = ("quest_deploy.evaluation.benchmark", "quest_deploy.stages.benchmark_pipeline")
    with ExitStack() as patches:
        for module in modules:
            direct = patch(f"{module}.in_own_process", lambda work, *given: work(*given))
            patches.enter_context(direct)
        yield


LINKS = ("to other names", "to the same names", "hard")


def linked(source: Path, target: Path, kind: str) -> Path:
    """A copy of a folder whose files lie in a store beside it: each is a link of one of the
    ``LINKS``, as DVC, the hub's cache and `cp -al` make them.
    """
    store = store_of(target)
    for i, path in enumerate(sorted(source.rglob("*"))):
        if not path.is_file() or path.name == ".lock":
            continue
        name = path.relative_to(source)
        place = target / name
        blob = store / (name if kind == "to the same names" else Path(f"{i % 7:02}", f"{i:038}"))
        for made in (place, blob):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        if kind == "hard":
            os.link(blob, place)
        else:
            place.symlink_to(os.path.relpath(blob, place.parent))
    return target


def store_of(target: Path) -> Path:
    """Where the files of a :func:`linked` folder lie."""
    return target.with_name(f"{target.name}-store")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and what it printed on standard output and standard
    error.
    """

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value; raise ValueError where it is anything else."""
        return strict_json(self.out)

    @property
    def message(self) -> str:
        """The one-line error message that ends standard error, or what a usage error's box says;
        raise AssertionError for a traceback or further lines.
        """
        assert "Traceback" not in self.err, self.err
        if self.err.startswith("Usage: "):
            return " ".join(line.strip("│ ") for line in self.err.splitlines()[3:-1])
        *before, last = self.err.splitlines()
        assert last.startswith("error: "), self.err
        assert not [line for line in before if line.startswith("error: ")], self.err
        return last.removeprefix("error: ")

    def assert_refused(self, *facts: object, code: int = 2) -> None:
        """It ended with ``code`` and one message that holds the ``facts``."""
        assert_holds(self.message, *facts)
        assert self.code == code


@dataclass(frozen=True)
class Chain:
    """A workspace, not to be changed, and how each command that made it ended."""

    root: Path
    outcomes: dict[str, Outcome]


def cli(*arguments: str | Path) -> Outcome:
    """Run `quest-deploy` with ``arguments`` in this process; what is not an ordinary end of the
    program is raised.
    """

    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["quest-deploy", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def strict_json(text: str) -> Any:
    """Parse JSON as its standard has it: one value, and neither NaN nor Infinity."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def places(problems: Iterable[str]) -> list[tuple[str, str]]:
    """Of what each problem of a verification is and where: the first and the last word before its
    colon, such as ("segment", "conv_out").
    """
    return [(words[0], words[-1]) for words in (x.split(":")[0].split() for x in problems)]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file in ``folder``, but for the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    }


def fail_verification(workspace: Path, backend: str) -> None:
    """Record that the engine of ``backend`` failed its verification, for two reasons."""
    opened = Workspace.open(workspace)
    record = opened.stages["verify/onnxruntime"]
    details = {
        **record.details,
        "backend": backend,
        "passed": False,
        "problems": ["layer conv_in: wrong", "layer conv_out: wrong"],
    }
    files = [workspace / name for name in record.files]
    inputs = (f"build-engine/{backend}", "reference")
    opened.record(
        f"verify/{backend}", inputs=inputs, options=record.options, files=files, details=details
    )


def png_of(image: Image.Image) -> bytes:
    """The image as a PNG file has it."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut off a file's second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def initializer(model: ir.Model, name: str) -> NDArray[Any]:
    """A copy of an initializer's values."""
    value = model.graph.initializers[name].const_value
    assert value is not None
    return np.array(value.numpy())


def set_initializer(model: ir.Model, name: str, array: NDArray[Any]) -> None:
    """Replace an initializer's values; its type stays."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    assert list(array.shape) == list(value.const_value.shape.numpy())
    if value.const_value.dtype is ir.DataType.INT4:
        packed = pack_int4(array.astype(np.int8))
        value.const_value = ir.PackedTensor(packed, ir.DataType.INT4, shape=array.shape, name=name)
    else:
        value.const_value = ir.tensor(array.astype(value.const_value.numpy().dtype), name=name)


def change(
    model: ir.Model, name: str, index: int | Iterable[int], *, by: float = 0.0, factor: float = 1.0
) -> None:
    """Change entries of an initializer, counted in C order."""
    array = initializer(model, name)
    flat = array.reshape(-1)
    flat[index] = flat[index] * array.dtype.type(factor) + array.dtype.type(by)
    set_initializer(model, name, flat.reshape(array.shape))
