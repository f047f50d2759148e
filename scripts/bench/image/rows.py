"""The rows of the table: a program each, at one precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from quest_deploy.backends.base import cpu_flags
from scripts.bench.image import prepare
from scripts.bench.image.prepare import (
    BF16,
    FLOAT,
    HYBRID,
    INT8,
    TEXT_ENCODER,
    UNET,
    VAE,
    OurForm,
    bytes_of,
    files_of,
)
from scripts.bench.image.runner import (
    OPTIMUM,
    OURS,
    SDCPP,
    Environments,
    MissingError,
    run_worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from scripts.bench.image.prepare import Prepared

WORKERS = "scripts.bench.image.workers"
BITS = ("w4a4", "w4a8", "w8a8")
KINDS = VNNI, AVX2 = ("vnni", "avx2")
"""Of machines, by whether the processor multiplies 8-bit integers exactly, in one instruction."""
_AT_ONCE = 2**24
SLOW_STEPS, SLOWEST_STEPS = 4, 3
"""That torch and stable-diffusion.cpp draw, of which a step takes 5 s and more on two cores."""


@dataclass(frozen=True)
class Ready:
    """What a worker is told beside the drawing, and the files that its program reads."""

    request: dict[str, Any]
    files: list[Path]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what it is called in the figures. label: in the table.
        worker: the module that measures it. environment: where that runs.
        ready: makes what it reads, with the environment's interpreter.
        quality: the form of the embedded model whose images are compared; empty where it is
            float's, or the program cannot run that model.
        full_only: the program knows Stable Diffusion's own sizes alone.
        drawn: the steps that a slow program draws of its first image; the others draw all.
        warm: whether a second drawing is measured; another has nothing to warm up.
        remark: what else the reader must know.
        bf16: whether it needs a processor that computes in bf16.
        kinds: the machines that it is of interest on.
    """

    name: str
    label: str
    worker: str
    environment: str
    ready: Callable[[Prepared, Path], Ready] = field(repr=False)
    quality: str = ""
    full_only: bool = False
    drawn: int | None = None
    warm: bool = True
    remark: str = ""
    bf16: bool = False
    kinds: tuple[str, ...] = KINDS

    @property
    def ours(self) -> bool:
        """Whether it is this toolchain's."""
        return self.worker == "ours"


def measure(row: Row, prepared: Prepared, environments: Environments) -> dict[str, Any]:
    """The figures of a row; see :func:`scripts.bench.image.workers.measuring.measure`, and
    "bytes", what its files take on disk.

    Raises:
        MissingError: its program is not installed, or the processor cannot compute so.
        QuestDeployError: it failed.
    """
    if row.bf16 and not has_bf16():
        raise MissingError("this processor has no bf16")
    python, size, threads = (
        environments.python(row.environment),
        prepared.size,
        prepared.threads,
    )
    ready = row.ready(prepared, python)
    request = drawing(size, threads) | {"inputs": str(prepared.inputs())} | ready.request
    if row.drawn is not None:
        request["cold_steps"] = min(row.drawn, size.steps)
    if not row.warm:
        request["warm_steps"] = 0
    read_once(ready.files)
    figures = run_worker(python, f"{WORKERS}.{row.worker}", request, threads)
    return figures | {"bytes": bytes_of(ready.files)}


def has_bf16() -> bool:
    """Whether this processor computes in bf16."""
    return bool({"avx512_bf16", "amx_bf16"} & {*cpu_flags()})


def read_once(paths: list[Path]) -> None:
    """Read the files, and those in the folders, so that the system's cache has them."""
    for file in files_of(paths):
        with file.open("rb") as stream:
            while stream.read(_AT_ONCE):
                pass


def drawing(size: prepare.Size, threads: int) -> dict[str, Any]:
    """What all workers are told."""
    return {
        "prompt": prepare.PROMPT,
        "guidance": prepare.GUIDANCE,
        "seed": prepare.SEED,
        "height": prepare.pixels(size),
        "width": prepare.pixels(size),
        "steps": size.steps,
        "cold_steps": size.steps,
        "warm_steps": size.warm_steps,
        "threads": threads,
    }


def _ours(form: OurForm, prepared: Prepared, python: Path) -> Ready:
    folder = prepared.workspace(form)
    parts = [folder / "parts" / name / prepare.BACKEND for name in ("text_encoder", "vae_decoder")]
    return Ready({"folder": str(folder)}, [folder / "engines" / prepare.BACKEND, *parts])


def _openvino(form: str, dtype: str, prepared: Prepared, python: Path) -> Ready:
    models = {part: prepared.models() / f"{part}.xml" for part in (TEXT_ENCODER, UNET, VAE)}
    models[UNET] = prepared.models(form) / f"{UNET}.xml"
    files = [x for path in models.values() for x in (path, path.with_suffix(".bin"))]
    request = {
        "folder": str(prepared.pipeline()),
        "parts": {part: str(path) for part, path in models.items()},
        "shapes": prepare.shapes_of(prepared.size),
        "dtype": dtype,
    }
    return Ready(request, files)


def _exported(form: str, prepared: Prepared, python: Path) -> Ready:
    folder = prepared.optimum(python, form)
    return Ready(
        {"folder": str(folder)}, [folder / x for x in ("text_encoder", "unet", "vae_decoder")]
    )


def _gguf(kind: str, prepared: Prepared, python: Path) -> Ready:
    path = prepared.gguf(python, kind)
    return Ready({"file": str(path)}, [path])


def _torch(compiled: bool, prepared: Prepared, python: Path) -> Ready:
    folder = prepared.pipeline()
    files = [folder / part for part in (TEXT_ENCODER, UNET, VAE)]
    return Ready({"folder": str(folder), "compiled": compiled}, files)


def rows_of(kind: str) -> list[Row]:
    """The rows of one kind of machine; processors that compute in bf16 have VNNI."""
    return [row for row in ROWS if kind in row.kinds and not (row.bf16 and kind == AVX2)]


def _row_of_ours(form: OurForm, kinds: tuple[str, ...] = KINDS) -> Row:
    words = "attention at 8 bits" if form.attention8 else "float attention"
    return Row(
        f"ours-{form.name}",
        f"ours, {form.bits.upper()}, {words}{', the rest in bf16' if form.bf16 else ''}",
        "ours",
        OURS,
        partial(_ours, form),
        quality=form.name,
        bf16=form.bf16,
        kinds=kinds,
    )


def _few(steps: int) -> str:
    return f"drawn in {steps} steps, the others counted as their median"


_OWN_PRECISION = "at its own precision, OpenVINO's default: bf16 where the processor has it"
_ENCODER_TOO = "it opens the VAE's encoder too"
ROWS = (
    *(_row_of_ours(OurForm(bits, attention)) for bits in BITS for attention in (True, False)),
    _row_of_ours(OurForm("w7a8"), (AVX2,)),
    *(_row_of_ours(OurForm("w8a8", attention, bf16=True)) for attention in (True, False)),
    Row(
        "openvino-fp32", "OpenVINO, FP32", "plain_openvino", OURS, partial(_openvino, FLOAT, "fp32")
    ),
    Row(
        "openvino-bf16",
        "OpenVINO, bf16",
        "plain_openvino",
        OURS,
        partial(_openvino, FLOAT, BF16),
        quality=BF16,
        bf16=True,
    ),
    *(
        Row(
            f"nncf-{form}{f'-{BF16}' if dtype == BF16 else ''}",
            f"NNCF, {words}{', the rest in bf16' if dtype == BF16 else ''}",
            "plain_openvino",
            OURS,
            partial(_openvino, form, dtype),
            quality=f"{form}-{BF16}" if dtype == BF16 else form,
            bf16=dtype == BF16,
        )
        for dtype in ("fp32", BF16)
        for form, words in ((INT8, "INT8"), (HYBRID, "hybrid INT8"))
    ),
    Row(
        "optimum-intel",
        "optimum-intel",
        "optimum_intel",
        OPTIMUM,
        partial(_exported, FLOAT),
        quality=BF16,
        remark=f"{_OWN_PRECISION}; {_ENCODER_TOO}",
    ),
    Row(
        "optimum-intel-hybrid",
        "optimum-intel, NNCF's hybrid UNet",
        "optimum_intel",
        OPTIMUM,
        partial(_exported, HYBRID),
        quality=f"{HYBRID}-{BF16}",
        remark=f"{_OWN_PRECISION}; {_ENCODER_TOO}; it would compress the other parts' weights too",
    ),
    Row(
        "openvino-genai",
        "OpenVINO GenAI",
        "genai",
        OPTIMUM,
        partial(_exported, FLOAT),
        quality=BF16,
        remark=_OWN_PRECISION,
    ),
    Row(
        "openvino-genai-int8",
        "OpenVINO GenAI, NNCF's INT8 UNet",
        "genai",
        OPTIMUM,
        partial(_exported, INT8),
        quality=f"{INT8}-{BF16}",
        remark=_OWN_PRECISION,
    ),
    *(
        Row(
            f"sdcpp-{kind}",
            f"stable-diffusion.cpp, {kind.upper()}",
            "sdcpp",
            SDCPP,
            partial(_gguf, kind),
            full_only=True,
            drawn=SLOWEST_STEPS,
            warm=False,
            remark=(
                f"by its defaults, drawn once; {_few(SLOWEST_STEPS)}; its package gives no "
                "predictions, its file holds the VAE's encoder too"
            ),
        )
        for kind in ("q8_0", "q4_0")
    ),
    Row(
        "torch",
        "torch, FP32, eager",
        "plain_torch",
        OURS,
        partial(_torch, False),
        drawn=SLOW_STEPS,
        remark=f"the cold image {_few(SLOW_STEPS)}; its files hold the VAE's encoder too",
    ),
    Row(
        "torch-compiled",
        "torch, FP32, compiled",
        "plain_torch",
        OURS,
        partial(_torch, True),
        drawn=SLOW_STEPS,
        remark=f"the cold image {_few(SLOW_STEPS)}, after the compiler's run",
    ),
)
