"""``pipeline`` and ``pipeline_stream``, the models that clients ask and that call the others."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_deploy.errors import InputError
from quest_deploy.files import write_json
from quest_deploy.models.channels import EDITING, INPAINTING
from quest_deploy.models.networks.prompt_encoders import Tokens
from quest_deploy.models.residuals import IMAGE_SCALE, IMAGE_TOKENS
from quest_deploy.models.schedulers import SCHEDULERS, scheduler_options
from quest_deploy.models.tokenizers import TOKENIZERS
from quest_deploy.serving.triton.configs import pipeline_config
from quest_deploy.serving.triton.layout import FILES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from quest_deploy.models.ip_adapters import ImagePrompts
    from quest_deploy.models.pipeline_model import PipelineModel
    from quest_deploy.models.residuals import Residual
    from quest_deploy.serving.triton.layout import Layout, Signature

PIPELINES = ("pipeline", "pipeline_stream")
MODEL_TIMEOUT = 600
"""Seconds that a pipeline waits for one answer of another model: long enough for the largest UNet
in its largest batch on a CPU.
"""
SCHEDULER = "ddim"


def write_pipelines(
    layout: Layout,
    model: PipelineModel,
    pipeline: Any,
    signatures: dict[str, Signature],
    residuals: Mapping[str, Residual] | None = None,
    shown: Mapping[str, Any] | None = None,
    tokens: Sequence[Tokens] | None = None,
) -> dict[str, Any]:
    """Write both; return the settings that they read.

    Args:
        pipeline: the diffusers pipeline with the tokenizers, None of a model that reads no text.
        signatures: of the models that they call.
        tokens: what each tokenizer gives; None for as many as it says, and nothing more.
        residuals: what a ControlNet adds to the UNet, if there is one.
        shown: how an IP-Adapter's images are read, if there is one; see
            :class:`quest_deploy.models.ip_adapters.ImagePrompts`.
    """
    tokenizers = _tokenizers(pipeline)
    if tokens is None:
        tokens = [Tokens(each.model_max_length) for each in tokenizers.values()]
    settings = _settings(layout, model, pipeline, signatures)
    settings["tokens"] = [asdict(each) for each in tokens]
    added = {name: [x.channels, x.divisor] for name, x in (residuals or {}).items()}
    settings["residuals"] = added
    if shown is not None:
        settings["image_prompt"] = dict(shown)
    inputs = pipeline_inputs(model, control=bool(added))
    limits = {
        "max_steps": layout.options.max_steps,
        "max_size": layout.max_size,
        "max_in_flight": layout.options.max_in_flight,
        "model_timeout": MODEL_TIMEOUT,
    }
    for name in PIPELINES:
        version, stream = layout.version_folder(name), name == "pipeline_stream"
        for source in (FILES / "pipeline").glob("*.py"):
            shutil.copyfile(source, version / source.name)
        if pipeline is not None:
            _write_tokenizers(version, model, tokenizers)
        else:
            _write_conditions(version, model)
        write_json(version / "settings.json", settings)
        images, queue = 1 if stream else layout.options.max_images, layout.options.max_queue
        layout.write_config(
            name,
            pipeline_config(name, inputs, limits, images, queue, stream=stream),
        )
    return settings


def pixels_per_latent(model: PipelineModel, sample_shape: tuple[int, ...]) -> int:
    """A side of an image, in sides of its latent sample."""
    image = model.images(np.zeros((1, *sample_shape), np.float32))
    return int(image.shape[2]) // sample_shape[1]


def largest_image(model: PipelineModel, layout: Layout) -> int | None:
    """The pixels of the largest side that the network has positions for; None of one without."""
    side = model.network.largest_side(model.config)
    return None if side is None else side * layout.pixels_per_latent


def guidable(model: PipelineModel) -> bool:
    """Whether requests may ask for guidance."""
    asked = model.asked_for == "prompt" and model.classifier_free
    return asked or _null_conditions(model) is not None


def pipeline_inputs(model: PipelineModel, *, control: bool) -> dict[str, str]:
    """The pipelines' inputs and their types, ``control`` for whether there is a ControlNet."""
    prompted = model.source.ip_adapter is not None
    conditions = {
        "prompt": {
            "prompt": "TYPE_STRING",
            **({"negative_prompt": "TYPE_STRING"} if model.classifier_free else {}),
        },
        "label": {"label": "TYPE_INT32"},
    }
    image = {
        INPAINTING: {"init_image": "TYPE_STRING", "mask_image": "TYPE_STRING"},
        EDITING: {"init_image": "TYPE_STRING", "image_guidance": "TYPE_FP32"},
    }
    return {
        **conditions.get(model.asked_for or "", {}),
        **image.get(image_kind(model) or "", {}),
        **({"control_image": "TYPE_STRING", "control_scale": "TYPE_FP32"} if control else {}),
        **({"ip_adapter_image": "TYPE_STRING", IMAGE_SCALE: "TYPE_FP32"} if prompted else {}),
        "seed": "TYPE_INT64",
        "steps": "TYPE_INT32",
        "scheduler": "TYPE_STRING",
        "guidance": "TYPE_FP32",
        "height": "TYPE_INT32",
        "width": "TYPE_INT32",
    }


def write_no_image(layout: Layout, prompts: ImagePrompts) -> None:
    """Write beside the pipelines the tokens of no image, [1, tokens, C], which the unconditional
    rows of an image with guidance read.
    """
    tokens = prompts.null(1)[IMAGE_TOKENS].numpy()
    for name in PIPELINES:
        np.savez(layout.version_folder(name) / "conditions.npz", ip_adapter_tokens=tokens)


def image_kind(model: PipelineModel) -> str | None:
    """What the model makes of an image; None where its UNet takes none."""
    return model.channels.image_kind if model.channels.image else None


def _tokenizers(pipeline: Any) -> dict[str, Any]:
    """The tokenizers of a pipeline, if it has any, under the names that they have in a package."""
    found = (getattr(pipeline, name, None) for name in TOKENIZERS)
    return dict(zip(TOKENIZERS, (each for each in found if each is not None), strict=False))


def _write_tokenizers(version: Path, model: PipelineModel, tokenizers: Mapping[str, Any]) -> None:
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(version / name)
        if not (version / name / "tokenizer.json").is_file():
            raise InputError(
                f"the {name} of {model.name} has no tokenizer.json; expected a fast tokenizer of "
                "transformers"
            )


def _write_conditions(version: Path, model: PipelineModel) -> None:
    """A table of what the UNet is conditioned on, a row for each label, the last one for none."""
    tables = {
        name: value.numpy() for name, value in model.conditions(np.arange(model.labels)).items()
    }
    if (null := _null_conditions(model)) is not None:
        tables = {
            name: np.concatenate([value, null[name].numpy()]) for name, value in tables.items()
        }
    if tables:
        np.savez(version / "conditions.npz", **tables)  # type: ignore[arg-type]


def _settings(
    layout: Layout, model: Any, pipeline: Any, signatures: dict[str, Signature]
) -> dict[str, Any]:
    of_text = pipeline is not None
    of_size = list(model.network.of_size(model.config, model.image_size, 1)) if of_text else []
    height, width = size = layout.size
    tokens = model.network.schedule_tokens(size)
    return {
        "model": model.name,
        "network": model.network.part,
        "sample_shape": list(layout.sample_shape),
        "text": of_text,
        "labels": 1 if of_text else model.labels,
        "guidable": guidable(model),
        "pixels_per_latent": layout.pixels_per_latent,
        "size": list(layout.pixels(layout.size)),
        "sizes": [list(layout.pixels(size)) for size in layout.sizes],
        "largest": largest_image(model, layout),
        "size_factor": layout.pixels_per_latent * layout.sample_multiple,
        "decoder": "vae_decoder" in signatures,
        "schedulers": _schedulers(model),
        "tokens_per_latent": None if tokens is None else tokens / (height * width),
        "embeds_guidance": model.embeds_guidance,
        "defaults": {
            "steps": min(model.steps, layout.options.max_steps),
            "scheduler": SCHEDULER,
            "guidance": model.guidance,
            "image_guidance": model.image_guidance,
        },
        "image": image_kind(model),
        "zero_unconditional": of_text and bool(pipeline.config.get("force_zeros_for_empty_prompt")),
        "of_size": of_size,
        "models": signatures,
    }


def _schedulers(model: PipelineModel) -> dict[str, dict[str, Any]]:
    """Those that know the model's kind of noise schedule: diffusers' classes and what configures
    them, by their short names. Another one would draw from other betas without a word.
    """
    found = {}
    for name in SCHEDULERS:
        with suppress(InputError):
            model.load_scheduler(name)
            kind, options = scheduler_options(name, model.scheduler_config())
            found[name] = {"class": kind.__name__, "config": options}
    return found


def _null_conditions(model: PipelineModel) -> dict[str, Tensor] | None:
    """Return what an image without a condition is drawn from; None where the model has none, and so
    no guidance.
    """
    try:
        return model.null_conditions(1)
    except InputError:
        return None
