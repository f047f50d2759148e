"""The classes of diffusers' pipelines: which are drawn, and as what; any other is refused by name
before its files are read.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers

from quest_deploy.errors import InputError
from quest_deploy.models.channels import IMAGE_KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT_TO_IMAGE = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "LatentConsistencyModelImg2ImgPipeline": "LatentConsistencyModelPipeline",
}
"""By an image-to-image class, the class that draws from noise with the same parts."""
CONTROLLED = {
    "controlnet": {
        "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
        "StableDiffusionInpaintPipeline": "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLInpaintPipeline": "StableDiffusionXLControlNetInpaintPipeline",
    },
    "adapter": {
        "StableDiffusionPipeline": "StableDiffusionAdapterPipeline",
        "StableDiffusionXLPipeline": "StableDiffusionXLAdapterPipeline",
    },
}
"""By a part that controls what is drawn, and by a class, the one that draws with it."""
_PARTS = {
    "scheduler",
    "vae",
    "vqvae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
}
_IMAGES = {"image", "video"}
_ASKED = {"prompt", "class_labels"}
_NAMES = {"unet": "UNet"}


def drawn_class(name: str, index: Mapping[str, Any], part: str) -> str:
    """The class that draws the pipeline of ``index``; one that diffusers does not have stays as it
    is.

    Args:
        name: the model's, for the message.
        part: its network's, "unet" or "transformer".

    Raises:
        InputError: the pipeline has no such network, needs a part that is not run here, or is
            called with more than a prompt or labels.
    """
    given: str = index["_class_name"]
    drawn = _TEXT_TO_IMAGE.get(given, given)
    found = getattr(diffusers, drawn, None)
    has_it = index.get(part, [None])[0] is not None
    problems = [] if has_it else [f"it has no {_NAMES.get(part, part)}"]
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        if parts := sorted(
            _required(found.__init__) - {part, *_PARTS} - set(found._optional_components)
        ):
            problems.append(f"it has a part that is not run here: {', '.join(parts)}")
        call = getattr(found, "__call__", None)  # noqa: B004 - its signature
        needed = _required(call) - _ASKED
        if drawn not in IMAGE_KINDS:
            needed |= _IMAGES & inspect.signature(call).parameters.keys() if call else set()
        if needed:
            problems.append(f"it is called with {', '.join(sorted(needed))}")
    if problems:
        raise InputError(
            f"{name}: a {given} is not supported: {'; '.join(problems)}; expected a pipeline that "
            "draws from a prompt, a label or nothing, inpaints, or edits by instructions"
        )
    return drawn


def controlled_class(pipeline_class: Any, part: str) -> Any:
    """The class of diffusers' pipelines that draws as ``pipeline_class`` does, with ``part``, a
    "controlnet" or an "adapter"; raise InputError where there is none.
    """
    classes = CONTROLLED[part]
    if (name := classes.get(pipeline_class.__name__)) is None:
        raise InputError(
            f"{part}: diffusers has no {pipeline_class.__name__} with one; expected one of "
            f"{', '.join(classes)}"
        )
    return getattr(diffusers, name)


def _required(function: Any) -> set[str]:
    """The arguments of ``function`` without a default."""
    if function is None:
        return set()
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in parameters if p.default is p.empty and p.kind not in variadic} - {
        "self"
    }
