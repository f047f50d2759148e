"""LoRAs fused into a model before it is quantized: W + weight * (alpha / rank) * B A in every layer
that they name, times DoRA's norm where they have one, after which nothing of the LoRA is left.

Read here rather than by diffusers, which leaves out some alphas and ranks, DoRA's scales, and
layers that it cannot match. Layouts differ in their keys alone:

1. kohya's: ``lora_unet_down_blocks_0_....lora_down.weight``, under diffusers' or Stability's names
   of the layers; with LoCon's ``lora_mid`` and DoRA's ``dora_scale`` (LyCORIS).
2. diffusers': ``unet.down_blocks.0....lora_A.weight`` and its older spellings, such as
   ``unet....attn1.processor.to_q_lora.down.weight``; its alphas stand in the file's metadata.
3. peft's own: ``base_model.model.down_blocks.0....lora_A.weight``; its alphas stand in
   adapter_config.json beside the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quest_deploy.artifacts.model_source import ADAPTER_CONFIG
from quest_deploy.artifacts.tensors import open_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import read_json
from quest_deploy.models.sgm_names import sgm_names
from quest_deploy.models.weights import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from quest_deploy.artifacts.model_source import Lora

    Layers = dict[str, dict[str, Tensor]]
    """The tensors of each layer: by its name in the file, by "down", "up", "mid", "alpha",
    "dora_scale" and "magnitude".
    """

_UNET = "unet"
_PEFT = "base_model.model."
"""What peft's own ``save_pretrained`` puts before the layers of the one model that it trained."""
_PREFIXES = {
    "unet.": _UNET,
    "lora_unet_": _UNET,
    _PEFT: _UNET,
    "model.diffusion_model.": _UNET,
    "diffusion_model.": _UNET,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""Of keys, with the part that they name; those without one are the UNet's."""
_ROLES = (
    re.compile(r"(?P<layer>.+)\.lora_(?P<role>A|B|down|up|mid)(\.default)?\.weight"),
    re.compile(r"(?P<layer>.+?)[._]lora(_linear_layer)?\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<role>alpha|dora_scale)"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<role>magnitude)_vector(\.default)?(\.weight)?"),
)
_SPELLINGS = {"A": "down", "B": "up"}
_METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps what LoraConfig says, as JSON in the file's header."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""The ways to begin training a LoRA that leave the model's own weights as they are."""
_OLD_ENCODER_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def fuse(loras: Sequence[Lora], part: str, model: nn.Module) -> None:
    """Fuse what ``loras`` have for ``part``, such as "unet" or "text_encoder_2", into ``model``, in
    place and in float32.

    Raises:
        InputError: one cannot be read, or names layers that the model does not have.
    """
    for lora in loras:
        parts, metadata = _read(lora)
        layers = parts.get(part, {})
        known = _known_layers(model)
        names = {layer: known.get(_flat(layer)) for layer in layers}
        if unknown := [layer for layer, name in names.items() if name is None]:
            raise InputError(
                f"the LoRA {lora.path} does not fit the model: {len(unknown)} of its "
                f"{len(layers)} layers for the {part} fit no layer of {type(model).__name__}: "
                f"{listed(unknown)}"
            )
        if twice := [str(name) for name, count in Counter(names.values()).items() if count > 1]:
            raise InputError(
                f"the LoRA {lora.path} names layers twice, in two spellings: {listed(twice)}"
            )
        for layer, tensors in layers.items():
            name = str(names[layer])
            try:
                weight: Any = model.get_submodule(name).weight
                own = layer.removeprefix(_prefix(layer))
                factor = lora.weight * _scale(tensors, _of_part(metadata, part), (own, name))
                with torch.no_grad():
                    result = fused(weight.float(), tensors, factor)
                    if not torch.isfinite(result).all():  # DoRA's norm of a row of zeros is 0
                        raise ValueError("its weight would not be finite")
                    weight.copy_(result)
            except (ValueError, TypeError, ArithmeticError, RuntimeError, re.error) as e:
                reason = " ".join(str(e).split())
                raise InputError(
                    f"the LoRA {lora.path} does not fit {part}.{name}: {reason}"
                ) from e


def check_parts(loras: Sequence[Lora], parts: Iterable[str]) -> None:
    """Raise InputError where one of the ``loras`` cannot be read, or has weights for a part that is
    not among ``parts``.
    """
    for lora in loras:
        if others := _read(lora)[0].keys() - set(parts):
            raise InputError(
                f"the LoRA {lora.path} has weights for {', '.join(sorted(others))}, which this "
                "model does not have"
            )


def fused(weight: Tensor, tensors: Mapping[str, Tensor], factor: float) -> Tensor:
    """A layer's weight [O, I, ...] with a LoRA fused into it.

    Args:
        tensors: "down" [r, I, ...] and "up" [O, r, ...]; for a convolution also "mid" [r, r, kh,
            kw] between them (LoCon); "magnitude" [O] or "dora_scale", which has 1 on the axes that
            its norm goes over (DoRA, arXiv 2402.09353).
        factor: the LoRA's weight times its scale.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    shapes = {role: list(tensor.shape) for role, tensor in tensors.items()}
    if any(len(shapes[role]) < 2 for role in ("down", "up", "mid") if role in shapes):
        raise ValueError(f"expected factors of two axes or more, found {shapes}")
    for role, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{role}: expected finite values")
    down, up = tensors["down"].float(), tensors["up"].float().flatten(1)
    if "mid" in tensors:
        down = torch.einsum("rs...,si->ri...", tensors["mid"].float(), down.flatten(1))
    down = down.flatten(1)
    expected = (len(weight), len(down), weight[0].numel())
    if (*up.shape, down.shape[1]) != expected:
        raise ValueError(f"expected factors of its weight {list(weight.shape)}, found {shapes}")
    result: Tensor = weight + factor * (up @ down).view_as(weight)
    scale = _norm_scale(weight, tensors)
    if scale is None:
        return result
    over = [axis for axis, size in enumerate(scale.shape) if size == 1]
    result *= scale / torch.linalg.vector_norm(result, dim=over, keepdim=True)
    return result


def _norm_scale(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """DoRA's scale, of as many axes as ``weight``: [O, 1, ...], or, as LyCORIS writes it, [1, I,
    1, ...]. As peft, a magnitude is of the outputs, whatever its shape.
    """
    ones = [1] * (weight.dim() - 1)
    if "magnitude" in tensors:
        scale, expected = tensors["magnitude"].float(), [[len(weight), *ones]]
        if scale.numel() == len(weight):
            scale = scale.reshape(expected[0])
    elif "dora_scale" in tensors:
        scale = tensors["dora_scale"].float()
        expected = [[len(weight), *ones], [1, weight.shape[1], *ones[1:]]]
        if scale.dim() == 1:
            scale = scale.reshape(-1, *ones)
    else:
        return None
    if list(scale.shape) not in expected:
        raise ValueError(
            f"DoRA's scale: expected {' or '.join(map(str, expected))}, found {list(scale.shape)}"
        )
    return scale


def _scale(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], names: Sequence[str]
) -> float:
    """alpha / rank: with the layer's own alpha, or what the file's metadata says of it under one of
    its ``names``, or 1.
    """
    if missing := [role for role in ("down", "up") if role not in tensors]:
        raise ValueError(f"expected both factors, and {' and '.join(missing)} is missing")
    if not (rank := len(tensors["down"])):
        raise ValueError("expected a rank of 1 or more")
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise ValueError(f"alpha: expected a number, found {list(tensors['alpha'].shape)}")
        return float(tensors["alpha"]) / rank
    if "lora_alpha" not in settings:
        return 1.0
    patterns = dict(settings.get("alpha_pattern") or {})
    key = next(
        (p for p in patterns if any(re.match(rf"(.*\.)?({p})$", name) for name in names)), None
    )
    alpha = float(settings["lora_alpha"] if key is None else patterns[key])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read(lora: Lora) -> tuple[dict[str, Layers], dict[str, Any]]:
    """A LoRA's layers by part, and the settings in its metadata; raise InputError where the file
    cannot be read or holds anything else.
    """
    try:
        with open_tensors(Path(lora.path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            metadata = json.loads((file.metadata() or {}).get(_METADATA) or "{}")
    except (OSError, SafetensorError, ValueError, RecursionError) as e:
        raise InputError(f"{lora.path} cannot be read as a LoRA ({e})") from e
    parts: dict[str, Layers] = {}
    strange = []
    for key, tensor in tensors.items():
        match = next((m for role in _ROLES if (m := role.fullmatch(key))), None)
        if match is None or not (tensor.is_floating_point() or match["role"] == "alpha"):
            strange.append(key)
            continue
        role = _SPELLINGS.get(match["role"], match["role"])
        part = _PREFIXES.get(_prefix(key), _UNET)
        entry = parts.setdefault(part, {}).setdefault(match["layer"], {})
        if role in entry:
            strange.append(key)
        entry[role] = tensor
    if strange or not parts:
        raise InputError(
            f"the LoRA {lora.path}: expected the factors of LoRA, LoCon or DoRA, found "
            f"{listed(strange) or 'nothing'}; convert it to a LoRA with the tool that trained it"
        )
    if metadata == {} and any(".lora_A." in key for key in tensors):
        metadata = _beside(lora, parts, needed=any(key.startswith(_PEFT) for key in tensors))
    if not isinstance(metadata, dict):
        raise InputError(f"the LoRA {lora.path}: expected {_METADATA} to be an object of JSON")
    for name, value in metadata.items():
        if name.endswith("init_lora_weights") and value not in _PLAIN_STARTS:
            raise InputError(
                f"the LoRA {lora.path} was trained from other weights than the model's ({value}); "
                "convert it to a plain LoRA with peft"
            )
    return parts, metadata


def _beside(lora: Lora, parts: Iterable[str], *, needed: bool) -> dict[str, Any]:
    """What LoraConfig says in the file that peft writes beside its weights, for each part; raise
    InputError where it is ``needed`` and missing, or cannot be read.
    """
    path = Path(lora.path).with_name(ADAPTER_CONFIG)
    if not path.is_file():
        if needed:
            raise InputError(
                f"the LoRA {lora.path}: expected {path.name} beside it, which holds its lora_alpha;"
                " copy it from where peft saved the LoRA"
            )
        return {}
    settings = read_json(path, repair="copy it again from where peft saved the LoRA")
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected an object of JSON, as peft writes it")
    return {f"{part}.{key}": value for part in parts for key, value in settings.items()}


def _prefix(key: str) -> str:
    return next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")


def _flat(layer: str) -> str:
    """A layer's name in a file as all layouts can be compared: without its part, "_" for "."."""
    return layer.removeprefix(_prefix(layer)).replace(".processor.", ".").replace(".", "_")


def _of_part(metadata: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {
        key.removeprefix(f"{part}."): value
        for key, value in metadata.items()
        if key.startswith(f"{part}.")
    }


def _known_layers(model: nn.Module) -> dict[str, str]:
    """The names of the convolutions and linear layers of ``model``, by all that a LoRA calls them,
    with "_" for ".".
    """
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    others: dict[str, str] = {}
    of_stability = sgm_names(model)
    for name in names:
        others[of_stability.get(name, name)] = name
        parent, _, last = name.rpartition(".")
        if parent.endswith(".to_out") and last == "0":
            others[parent] = name
        # transformers' CLIP was once all in "text_model", and diffusers named its attention's
        # layers as a UNet's.
        inside = name.removeprefix("text_model.")
        old = f"{inside.rpartition('.')[0]}.{_OLD_ENCODER_NAMES.get(last, last)}"
        for spelling in (inside, old):
            others |= {spelling: name, f"text_model.{spelling}": name}
    known = others | {name: name for name in names}
    return {key.replace(".", "_"): name for key, name in known.items()}
