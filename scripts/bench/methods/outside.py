"""Other packages' post-training quantization of the same model on the same trajectories."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_deploy.errors import InputError
from quest_deploy.evaluation.sampling import float_denoiser

if TYPE_CHECKING:
    from quest_deploy.calibration.trajectories import Trajectories
    from quest_deploy.evaluation.sampling import Denoiser
    from quest_deploy.progress import Progress

BATCH = 64
ENDS = ("conv_in", "conv_out", "pos_embed.proj", "proj_out")
"""The first and the last layer, of a UNet and of a transformer."""


def modelopt(
    config_name: str, bits: str, unet: nn.Module, trajectories: Trajectories, report: Progress
) -> tuple[Denoiser, int, dict[str, Any]]:
    """Quantize ``unet``, which is changed, to ``bits``, such as "w4a8", with an integer
    configuration of modelopt's.

    Returns:
        The fake-quantized model, the bytes of its weights, and how many of its layers are
        quantized.

    Raises:
        InputError: the package is missing.
    """
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as e:
        raise _missing("nvidia-modelopt", "modelopt", e) from e
    parameters = sum(parameter.numel() for parameter in unet.parameters())

    def forward(quantized: nn.Module) -> None:
        batches = list(trajectories.batches(BATCH))
        for i, inputs in enumerate(batches):
            quantized(**inputs)
            report("modelopt calibrates", i + 1, len(batches))

    config = copy.deepcopy(getattr(mtq, config_name))
    weight_bits, activation_bits = int(bits[1]), int(bits[3])
    _set_bits(config["quant_cfg"], {"weight": weight_bits, "input": activation_bits})
    with torch.no_grad():
        quantized: nn.Module = mtq.quantize(unet, config, forward)
    names = [name for name, m in quantized.named_modules() if name.endswith("weight_quantizer")]
    enabled = [name for name in names if quantized.get_submodule(name).is_enabled]
    payload = 4 * parameters
    for name in enabled:
        layer = name.rpartition(".")[0]
        weight = quantized.get_submodule(layer).get_parameter("weight")
        stored = 8 if layer in ENDS else weight_bits
        # A scale for each output channel, in place of the float weight.
        payload += weight.numel() * stored // 8 + 4 * len(weight) - 4 * weight.numel()
    notes = {"layers": len(names), "quantized_layers": len(enabled)}
    return float_denoiser(quantized), payload, notes


def _set_bits(entries: list[dict[str, Any]], bits: dict[str, int]) -> None:
    """Change the bits of "weight" and "input" quantizers, but for the first and the last layer."""
    for kind, number in bits.items():
        (entry,) = (x for x in entries if x["quantizer_name"] == f"*{kind}_quantizer")
        for end in ENDS:
            entries.append({**copy.deepcopy(entry), "quantizer_name": f"{end}.{kind}_quantizer"})
        entry["cfg"]["num_bits"] = number


class _Named(nn.Module):
    """A network with the inputs of the toolchain's graphs; a transformer has a mask."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The prediction [B, ...]."""
        mask = () if encoder_attention_mask is None else (encoder_attention_mask,)
        result: Tensor = self.unet(
            sample, timestep, encoder_hidden_states, *mask, return_dict=False
        )[0]
        return result


def nncf(unet: nn.Module, trajectories: Trajectories) -> tuple[Denoiser, int, dict[str, Any]]:
    """Quantize ``unet`` with NNCF's defaults for transformers.

    Returns:
        The model as OpenVINO runs it, the bytes of its weights, and how many tensors are quantized.

    Raises:
        InputError: the package is missing.
    """
    try:
        import nncf
        import openvino
    except ImportError as e:
        raise _missing("nncf", "bench", e) from e
    batches = list(trajectories.batches(BATCH))
    with torch.no_grad():
        converted = openvino.convert_model(_Named(unet).eval(), example_input=batches[0])
    converted.reshape({name: [-1, *value.shape[1:]] for name, value in batches[0].items()})
    dataset = nncf.Dataset([{name: x.numpy() for name, x in each.items()} for each in batches])
    quantized = nncf.quantize(
        converted, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(quantized, Path(folder) / "model.xml", compress_to_fp16=False)
        payload = (Path(folder) / "model.bin").stat().st_size
    compiled = openvino.Core().compile_model(
        quantized,
        "CPU",
        {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"},
    )

    def denoise(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        inputs = {"sample": sample, "timestep": timestep, **conditions}
        result = compiled({name: value.numpy() for name, value in inputs.items()})[0]
        return torch.from_numpy(result.copy())

    kinds = [operation.get_type_name() for operation in quantized.get_ops()]
    return denoise, payload, {"quantized_tensors": kinds.count("FakeQuantize")}


def _missing(package: str, extra: str, error: ImportError) -> InputError:
    return InputError(
        f"{package} is not installed ({error}): install it with `pip install -c constraints.txt "
        f"'.[{extra}]'`"
    )
