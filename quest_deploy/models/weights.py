"""The weights of a pipeline's part (UNet, text encoder, decoder) in its folder: one file or shards,
plain or of a variant such as fp16; all that its configuration promises and nothing that is not
finite, or refused by name.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError
from torch import nn

from quest_deploy.artifacts.tensors import open_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import read_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_FILE = re.compile(
    r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?"
    r"(-\d+-of-\d+)?\.safetensors"
)
"""A shard's number stands behind its variant; older diffusers wrote it before."""
_COUNTERS = ("position_ids", "num_batches_tracked")
"""Integers that older files hold beside the weights."""
_LISTED = 4
logger = logging.getLogger(__name__)


def load_part(
    folder: Path,
    part_class: Any,
    *,
    whole: bool = False,
    unused: Collection[str] = (),
    narrow: bool = False,
) -> Any:
    """The module of ``part_class``, diffusers' or transformers', from its folder, in float32 and
    evaluation mode.

    Args:
        whole: refuse weights that the module has no place for, rather than say so.
        unused: the names of those that published files hold though no module reads them.
        narrow: keep what is bfloat16 in the files so, see :func:`in_float32`.

    Raises:
        InputError: there are no safetensors; weights are missing, of another shape or not finite;
            or this machine has not the memory for them.
    """
    files, variant = _files(folder)
    elements = sum(map(_elements, files))
    narrow = narrow and all(map(_is_narrow, files))
    check_memory(elements, str(folder), narrow=narrow)
    module, info = part_class.from_pretrained(
        folder,
        torch_dtype=torch.bfloat16 if narrow else torch.float32,
        use_safetensors=True,
        local_files_only=True,
        variant=variant,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused here, all of them
    )
    info["unexpected_keys"] = set(info["unexpected_keys"]) - set(unused)
    _check_fit(folder, info, whole=whole)
    check_weights(module, str(folder))
    return in_float32(module, narrow=narrow).eval()


def load_single_file(path: Path, part_class: Any, folder: Path, part: str) -> Any:
    """The module of ``part_class`` from the single file at ``path``, in float32, with the
    configuration of ``part`` in ``folder``; raise InputError where weights are missing or not
    finite.
    """
    options: dict[str, Any] = {
        "config": str(folder),
        "subfolder": part,
        "torch_dtype": torch.float32,
    }
    try:
        module = part_class.from_single_file(str(path), **options)
    except NotImplementedError:  # it would move weights that are missing, and does not name them
        try:
            _strict(part_class).from_single_file(str(path), low_cpu_mem_usage=False, **options)
            raise
        except RuntimeError as e:
            reason = " ".join(str(e).split())
            raise InputError(f"{path}: its {part} cannot be loaded: {reason}") from e
    check_weights(module, f"{path}, its {part}")
    return module.eval()


def _strict(part_class: Any) -> Any:
    class Strict(part_class):  # type: ignore[misc]
        def load_state_dict(self, state: Any, strict: bool = True) -> Any:
            return super().load_state_dict(state)

    return Strict


def check_weights(module: nn.Module, where: str) -> None:
    """Raise InputError where a weight of ``module`` was not loaded or is not finite."""
    state = {name: value for name, value in module.state_dict().items() if value.numel()}
    if missing := [name for name, value in state.items() if value.is_meta]:
        raise InputError(f"{where}: weights are missing: {listed(missing)}")
    for name, value in state.items():
        if value.is_floating_point() and not torch.stack(torch.aminmax(value)).isfinite().all():
            raise InputError(
                f"{where}: {name} holds values that are not finite; the file is damaged, or its "
                "training or conversion diverged"
            )


def in_float32(module: nn.Module, *, narrow: bool) -> nn.Module:
    """``module``, in place, computing in float32.

    Args:
        narrow: leave the weights of linear layers in bfloat16 where they are, and widen each while
            its layer runs: the same results in half the memory.
    """
    for layer in module.modules():
        held = narrow and isinstance(layer, nn.Linear) and layer.weight.dtype is torch.bfloat16
        for name, value in (*layer._parameters.items(), *layer._buffers.items()):
            if value is None or (held and name == "weight"):
                continue
            if value.dtype is torch.bfloat16:
                value.data = value.float()
        if held:
            layer.register_forward_pre_hook(_widen)
            layer.register_forward_hook(_narrow, always_call=True)
    return module


def _widen(layer: nn.Module, args: Any) -> None:
    weight = layer.get_parameter("weight")
    if weight.dtype is torch.bfloat16:
        layer.__dict__["narrow_weight"] = weight.data  # no buffer of its own
        weight.data = weight.float()


def _narrow(layer: nn.Module, args: Any, output: Any) -> None:
    if "narrow_weight" in layer.__dict__:
        layer.get_parameter("weight").data = layer.__dict__.pop("narrow_weight")


def check_memory(elements: int, where: str, *, narrow: bool = False) -> None:
    """Raise InputError where so many weights, float32 or ``narrow`` bfloat16 ones, do not fit this
    machine's memory; what this process holds, it may free.
    """
    needed = (2 if narrow else 4) * elements
    memory = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if needed > memory:
        raise InputError(
            f"{where}: its float weights take {needed / 1e9:.1f} GB, and this machine has "
            f"{memory / 1e9:.1f} GB of memory left"
        )


def _files(folder: Path) -> tuple[list[Path], str | None]:
    """The files of the weights in ``folder`` and the variant that they are, None for the plain."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file() and (match := _FILE.fullmatch(path.name)):
            found.setdefault(match["variant"], []).append(path)
    if not found:
        others = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".msgpack")
        )
        raise InputError(
            f"{folder}: expected weights as .safetensors, found {', '.join(others) or 'none'}"
            + (
                "; convert them once, if you trust them: DiffusionPipeline.from_pretrained(OLD, "
                "use_safetensors=False).save_pretrained(NEW)"
                if others
                else ""
            )
        )
    variant = None if None in found else next(iter(found))
    if None not in found and len(found) > 1:
        raise InputError(
            f"{folder}: expected the weights or one variant of them, found "
            f"{' and '.join(sorted(map(str, found)))}; keep one"
        )
    _check_shards(folder, variant)
    return found[variant], variant


def _check_shards(folder: Path, variant: str | None) -> None:
    """Raise InputError where a file that an index of shards names is missing."""
    for index in folder.glob(f"*.safetensors.index{f'.{variant}' if variant else ''}.json"):
        content = read_json(index, repair="get the model again")
        named = content.get("weight_map") if isinstance(content, dict) else None
        shards = set(named.values()) if isinstance(named, dict) else {None}
        for shard in shards:
            if not isinstance(shard, str) or not (folder / Path(shard).name).is_file():
                raise InputError(
                    f"{index}: expected the shard {shard} beside it, and it is missing"
                )


def _is_narrow(path: Path) -> bool:
    """Whether all that a safetensors file, which :func:`_elements` took, holds is bfloat16."""
    with open_tensors(path, "pt") as file:
        return all(file.get_slice(key).get_dtype() == "BF16" for key in file.keys())  # noqa: SIM118


def _elements(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header; raise InputError where it is
    none, or where weights are integers: they are codes of a quantization that is not known here.
    """
    try:
        with open_tensors(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            codes = [
                f"{key} ({x.get_dtype()})"
                for key, x in slices.items()
                if "F" not in x.get_dtype() and not key.endswith(_COUNTERS)
            ]
            elements: int = sum(math.prod(x.get_shape()) for x in slices.values())
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: not a readable safetensors file ({e}); get it again") from e
    if codes:
        raise InputError(
            f"{path}: expected weights in floating point, found {listed(codes)}; give the model "
            "as it was before it was quantized"
        )
    return elements


def _check_fit(folder: Path, info: dict[str, Collection[Any]], *, whole: bool) -> None:
    missing, superfluous = info["missing_keys"], info["unexpected_keys"]
    shapes = [
        f"{key} of {list(found)} instead of {list(expected)}"
        for key, found, expected in info["mismatched_keys"]
    ]
    problems = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            ("are missing", missing),
            ("have another shape", shapes),
            ("have no place in it", superfluous if whole or missing or shapes else ()),
        )
        if names
    ]
    name = next(iter(missing), "")
    prefix = next((x.removesuffix(name) for x in superfluous if x.endswith(f".{name}")), None)
    if missing and prefix and {f"{prefix}{name}" for name in missing} <= set(superfluous):
        problems.append(f"they have the prefix {prefix!r} too much: take it off")
    if problems:
        raise InputError(
            f"{folder}: its weights do not fit its configuration: {'; '.join(problems)}"
        )
    if superfluous:
        logger.warning(
            "%s: %d weights have no place in its configuration and are left out: %s",
            folder,
            len(superfluous),
            listed(superfluous),
        )


def listed(names: Iterable[str]) -> str:
    """The first of the sorted ``names``, and how many more there are."""
    found = sorted(names)
    rest = len(found) - _LISTED
    return ", ".join(found[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
