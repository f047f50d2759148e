"""What one file with a whole model says of itself: which architecture it has, and what it predicts.

Nothing in such a file must say whether it predicts noise or velocity, and a wrong guess draws
noise. Read are, as diffusers, ComfyUI and the trainers write and read them, the marker tensors, the
metadata, the training step and the weights of Stable Diffusion 2, and the original configuration
(YAML) of the same name beside the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.models.model_loading_utils import load_state_dict
from safetensors import safe_open

from quest_deploy.artifacts.model_source import beside
from quest_deploy.artifacts.tensors import open_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import check_archive, read_bounded
from quest_deploy.models.plain_yaml import load_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ARCHITECTURES = {"v1": "sd15", "v2": "sd21", "xl_base": "sdxl"}
"""By what diffusers calls the contents of a single file."""
_SD2_BASE_SAMPLE = 64
"""Stable Diffusion 2 has 768 pixels where it predicts velocity, and 512 where it predicts noise."""
_SD2_BASE_STEP = 875000
_SD2_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_VELOCITY_DEVIATION = 0.09
"""ComfyUI's mark of velocity: the deviation of that norm's bias is larger."""
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_LABELS = "model.diffusion_model.label_emb.0.0.weight"
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_VELOCITY, _ZERO_SNR = "v_pred", "ztsnr"
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_TYPES = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_ARCHITECTURE_TYPES = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
"""The classes by which Stability's newer configurations say it."""
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
"""Diffusers' names of CompVis's noise schedules."""
_NUMBERS: dict[str, tuple[str, type]] = {
    "linear_start": ("beta_start", float),
    "linear_end": ("beta_end", float),
    "timesteps": ("num_train_timesteps", int),
}
"""Their settings, and what diffusers calls them."""
_MAX_YAML_BYTES = 2**20
_MOST_NESTED = 4
"""A pickle can hold itself, endlessly."""
ASK = "say it with --prediction-type"


@dataclass(frozen=True)
class SingleFile:
    """What a single file holds.

    Attributes:
        architecture: of ours.
        schedule: what differs from the architecture's scheduler configuration.
        sample_size: where it differs from the architecture's.
        in_channels: of the UNet, where the file says it.
    """

    architecture: str
    schedule: dict[str, Any]
    sample_size: int | None
    in_channels: int | None


def read_single_file(path: Path, prediction_type: str | None) -> SingleFile:
    """What ``path`` says of itself.

    Args:
        prediction_type: what the user says, which goes before all of it.

    Raises:
        InputError: it cannot be read safely, is of none of our architectures, is a model in sigmas,
            or says nothing or different things of what it predicts.
    """
    tensors, kind, step = _read(path)
    if found := [name for name in _EDM if name in tensors]:
        raise InputError(
            f"{path}: {found[0]} marks an EDM model, which is sampled in sigmas: not supported"
        )
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"{path}: expected a checkpoint of Stable Diffusion 1, 2 or XL, found one of {kind}; "
            "give a diffusers folder"
        )
    if kind != "xl_base" and _LABELS in tensors:
        raise InputError(f"{path}: {_LABELS}: UNets conditioned on images (unCLIP) not supported")
    schedule = _original_configuration(path)
    parameterization = schedule.pop("prediction_type", None)
    if (chosen := prediction_type) is None:
        said = dict(_said(path, kind, tensors, step))
        if parameterization is not None:
            said[f"{beside(path)}"] = _type_of(
                parameterization, f"{beside(path)}: parameterization"
            )
        chosen = _agreed(path, kind, said)
    schedule["prediction_type"] = chosen
    if _ZERO_SNR in tensors and chosen == "v_prediction":
        schedule["rescale_betas_zero_snr"] = True
    conv_in = tensors.get(_CONV_IN)
    return SingleFile(
        _ARCHITECTURES[kind],
        schedule,
        _SD2_BASE_SAMPLE if kind == "v2" and chosen == "epsilon" else None,
        None if conv_in is None or conv_in.dim() != 4 else conv_in.shape[1],
    )


def _read(path: Path) -> tuple[dict[str, torch.Tensor], str, int | None]:
    """The tensors of ``path`` by name, what diffusers calls them, and the training step."""
    try:
        check_archive(path)
        if path.suffix == ".safetensors":
            open_tensors(path)  # what is none diffusers would read as text, all of it
        content = load_state_dict(str(path))
        step = content.get("global_step")
        for _ in range(_MOST_NESTED):
            if "state_dict" not in content:
                break
            content = content["state_dict"]
            step = content.get("global_step", step)
        else:
            raise InputError(
                f"{path}: expected at most {_MOST_NESTED - 1} state_dict inside each other; "
                "convert it to .safetensors"
            )
        tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
        return tensors, infer_diffusers_model_type(tensors), None if step is None else int(step)
    except InputError:
        raise
    except Exception as e:
        raise InputError(
            f"{path}: it cannot be read as tensors alone (weights_only); convert it to "
            ".safetensors, or give a diffusers folder"
        ) from e


def _said(
    path: Path, kind: str, tensors: dict[str, torch.Tensor], step: int | None
) -> Iterator[tuple[str, str]]:
    """What says which prediction type it has, and which."""
    if _VELOCITY in tensors:
        yield _VELOCITY, "v_prediction"
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
    for key in _METADATA:
        if key in metadata:
            yield key, _type_of(metadata[key], f"{path}: {key}")
    if metadata.get("ss_v_parameterization") == "True":
        yield "ss_v_parameterization", "v_prediction"
    architecture = metadata.get("modelspec.architecture", "")
    if architecture in _ARCHITECTURE_TYPES:
        yield "modelspec.architecture", _ARCHITECTURE_TYPES[architecture]
    if kind != "v2":
        return
    if step == _SD2_BASE_STEP:
        yield f"global_step {step}", "epsilon"
    if (bias := tensors.get(_SD2_NORM)) is not None:
        is_velocity = float(torch.std(bias.float(), unbiased=False)) > _SD2_VELOCITY_DEVIATION
        yield _SD2_NORM, "v_prediction" if is_velocity else "epsilon"
    elif step not in (None, _SD2_BASE_STEP):
        yield f"global_step {step}", "v_prediction"


def _agreed(path: Path, kind: str, said: dict[str, str]) -> str:
    types = sorted(set(said.values()))
    if len(types) > 1:
        sources = ", ".join(f"{name} says {value}" for name, value in said.items())
        raise InputError(f"{path}: {sources}; {ASK}")
    if not types and kind == "v2":
        raise InputError(
            f"{path}: Stable Diffusion 2 predicts epsilon (512 pixels) or v_prediction (768), and "
            f"the file does not say which; {ASK}"
        )
    return types[0] if types else "epsilon"


def _type_of(name: Any, where: str) -> str:
    if str(name) not in _TYPES:
        raise InputError(f"{where}: expected {', '.join(_TYPES)}, found {str(name)[:40]!r}; {ASK}")
    return _TYPES[str(name)]


def _original_configuration(path: Path) -> dict[str, Any]:
    """What the YAML file beside ``path`` says of the noise schedule, in diffusers' words but for
    the prediction type; nothing where there is none. Raise InputError where it is none of
    CompVis's or Stability's, or in sigmas.
    """
    file = beside(path)
    if file is None:
        return {}
    expected = f"{file}: expected the original configuration of {path.name} (model: params: …)"
    try:
        content = load_yaml(read_bounded(file, _MAX_YAML_BYTES, "move it away"))
        parameters = content["model"]["params"]
        denoiser = parameters.get("denoiser_config", {}).get("params", {})
        scaling, steps = denoiser.get("scaling_config"), denoiser.get("discretization_config")
        classes = [str(x["target"]).rpartition(".")[2] for x in (scaling, steps) if x is not None]
        # YAML reads 1e-3 as text.
        found: dict[str, Any] = {
            key: number(parameters[name])
            for name, (key, number) in _NUMBERS.items()
            if name in parameters
        }
    except (
        yaml.YAMLError,
        RecursionError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
    ) as e:
        reason = " ".join(str(e).split()) if isinstance(e, yaml.YAMLError) else ""
        raise InputError(
            f"{expected}{reason and f' ({reason})'}; correct it, or move it away"
        ) from e
    if wrong := [name for name in classes if name not in (*_SCALINGS, "LegacyDDPMDiscretization")]:
        raise InputError(f"{file}: {wrong[0]}: models sampled in sigmas are not supported")
    types = [_SCALINGS[name] for name in classes if name in _SCALINGS]
    if not types and not denoiser:
        types = [parameters.get("parameterization", "eps")]
    if types:
        found["prediction_type"] = types[0]
    if (betas := parameters.get("beta_schedule")) is not None:
        if (betas := str(betas)) not in _BETAS:
            raise InputError(
                f"{file}: beta_schedule: expected {', '.join(_BETAS)}, found {betas[:40]!r}"
            )
        found["beta_schedule"] = _BETAS[betas]
    return found
