"""How near the embedded model's images come to FP32's at the bits of the rows: the same calibration
by min-max and the same forms of NNCF's, on a trained model. Torch draws FP32's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.files import sha256_of
from quest_deploy.models.registry import EMBEDDED, EMBEDDED_FOLDER
from quest_deploy.processes import in_own_process
from scripts.bench.image.prepare import (
    BACKEND,
    BF16,
    HYBRID,
    INT8,
    OurForm,
    nncf_form,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quest_deploy.evaluation.sampling import Denoiser

CALIBRATION_SAMPLES, STEPS = 4, 20
BATCH = 8
IMAGES = 8


def quality_of(folder: Path, form: str, threads: int, images: int = IMAGES) -> dict[str, Any]:
    """The likeness of ``images`` images to FP32's, in a process of its own: "psnr" in decibels and
    "ssim", each None where there is none.

    Args:
        folder: keeps FP32's images, for all forms.
        form: such as "w4a8" or "w4a8-attention8" of ours, or "int8", "hybrid-bf16" or "bf16" of
            OpenVINO's.
    """
    found: dict[str, Any] = in_own_process(_compare, folder, form, threads, images)
    return found


def _compare(kept: Path, form: str, threads: int, images: int) -> dict[str, Any]:
    import torch

    from quest_deploy.evaluation.quality import SamplingOptions, draw, evaluate_images
    from quest_deploy.evaluation.sampling import float_denoiser
    from quest_deploy.models.loading import load_model, resolve_source

    torch.set_num_threads(threads)
    model = load_model(resolve_source(EMBEDDED))
    sampling = SamplingOptions(images, steps=STEPS, guidance=model.guidance)
    unet = sha256_of(EMBEDDED_FOLDER / "unet" / "diffusion_pytorch_model.safetensors")
    path = kept / f"fp32-images-{unet[:12]}-{images}.npy"
    if not path.exists():
        with whole(path) as partial, partial.open("wb") as stream:
            np.save(stream, draw(model, float_denoiser(model.load_unet()), sampling)[0])
    expected = np.load(path)
    with tempfile.TemporaryDirectory(prefix="quest-deploy-") as folder:
        if form.startswith((INT8, HYBRID, BF16)):
            denoise = _openvinos(model, form, threads)
        else:
            denoise = _ours(OurForm.of(form), Path(folder) / "ours", threads)
        found, labels = draw(model, denoise, sampling)
        del denoise
    compared = evaluate_images(found, labels, expected, [])
    return {"psnr": compared.psnr, "ssim": compared.ssim}


def _ours(form: OurForm, folder: Path, threads: int) -> Denoiser:
    import quest_deploy as qd
    from quest_deploy.backends.engine_unet import EngineUNet

    workspace = qd.calibrate(
        EMBEDDED,
        bits=form.bits,
        workspace=folder,
        method="minmax",
        samples=CALIBRATION_SAMPLES,
        steps=STEPS,
        **form.calibration,
    )
    qd.export(workspace)
    qd.build_engine(workspace, backend=BACKEND, threads=threads, dtype=form.dtype)
    return EngineUNet.load(workspace, BACKEND)


def _openvinos(model: Any, form: str, threads: int) -> Denoiser:
    import openvino
    import torch

    from quest_deploy.calibration.trajectories import record_trajectories
    from scripts.bench.image.workers.plain_openvino import PRECISIONS

    unet = model.load_unet()
    recorded = record_trajectories(
        model, unet, steps=STEPS, samples=CALIBRATION_SAMPLES, seed=0, rows=model.forward_rows
    )
    batches: Sequence[dict[str, Tensor]] = list(recorded.batches(BATCH))
    feeds = [{name: value.numpy() for name, value in batch.items()} for batch in batches]

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    with torch.no_grad():
        converted = openvino.convert_model(Named().eval(), example_input=batches[0])
    converted.reshape({name: [-1, *value.shape[1:]] for name, value in feeds[0].items()})
    kind, _, rest = form.partition("-")
    quantized = converted if kind == BF16 else nncf_form(converted, kind, feeds)
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[BF16 if BF16 in (kind, rest) else "fp32"],
    }
    compiled = openvino.Core().compile_model(quantized, "CPU", properties)

    def denoise(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        inputs = {"sample": sample, "timestep": timestep, **conditions}
        found = compiled({name: value.numpy() for name, value in inputs.items()})[0]
        return torch.from_numpy(found.copy())

    return denoise
