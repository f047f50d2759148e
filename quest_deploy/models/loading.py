"""From a name or a path to a model: where it comes from, and the object that stands for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts.model_source import (
    IMPORTED,
    IMPORTED_ALONE,
    IPAdapter,
    Lora,
    ModelSource,
    fingerprint,
)
from quest_deploy.errors import InputError
from quest_deploy.files import absolute
from quest_deploy.models.hub import fetch_pipeline
from quest_deploy.models.registry import KNOWN_MODELS, OTHERWISE, check_model_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quest_deploy.artifacts.image_folder import ImageFolder
    from quest_deploy.models.pipeline_model import PipelineModel


def resolve_source(
    model: str,
    *,
    revision: str | None = None,
    random_weights: bool = False,
    loras: Sequence[str] = (),
    prediction_type: str | None = None,
    ip_adapter: str | None = None,
    image_encoder: Path | None = None,
) -> ModelSource:
    """Where ``model`` comes from: a registry's name, a diffusers folder or a single file. A model
    on the hub is fetched here.

    Args:
        revision: of a model on the hub, a commit, branch or tag instead of the registry's.
        loras: each "PATH" or "PATH:WEIGHT".
        prediction_type: what the model predicts, where its files do not say it.
        ip_adapter: "PATH" or "PATH:SCALE".
        image_encoder: the folder of what encodes its images, see :class:`IPAdapter`.

    Raises:
        InputError: there is no such model, an option does not apply to it, or the hub does not give
            it.
    """
    if image_encoder is not None and ip_adapter is None:
        raise InputError("--image-encoder: needs --ip-adapter")
    fused: dict[str, Any] = {
        "loras": tuple(Lora.parse(text) for text in loras),
        "ip_adapter": None if ip_adapter is None else IPAdapter.parse(ip_adapter, image_encoder),
    }
    check_model_name(model)
    known = KNOWN_MODELS.get(model)
    if revision is not None and (random_weights or known is None or known.repository is None):
        raise InputError(f"--revision: expected a model from the hub, not {model}")
    if known is None:
        path = absolute(Path(model))
        name = path.name if path.is_dir() else path.stem
        print_of_it = None if random_weights else fingerprint(path)
        return ModelSource(
            name,
            str(path),
            random_weights=random_weights,
            **fused,
            fingerprint=print_of_it,
            prediction_type=prediction_type,
        )
    if random_weights or known.folder is not None:
        return ModelSource(
            model, random_weights=random_weights, prediction_type=prediction_type, **fused
        )
    if known.repository is None:
        raise InputError(
            f"{model} has no repository in diffusers' layout on the Hugging Face Hub; {OTHERWISE}"
        )
    commit = revision or known.revision
    if commit is None:
        raise InputError(
            f"{model}: no commit of {known.repository} is pinned; name one with --revision, or "
            f"{OTHERWISE}"
        )
    folder = fetch_pipeline(known.repository, commit)
    return ModelSource(
        model,
        known.repository,
        folder.name,
        revision,
        **fused,
        prediction_type=prediction_type,
    )


def load_model(
    source: ModelSource, prompts: Sequence[str] | None = None, images: ImageFolder | None = None
) -> PipelineModel:
    """The model of ``source``.

    Args:
        prompts: what its labels stand for, for a text-to-image model; a short list of our own where
            it is None.
        images: a folder of what they stand for too, for a model that inpaints or edits images; made
            ones where it is None.

    Raises:
        InputError: there is none, or it is not what it was when the source was recorded.
    """
    if source.name == IMPORTED and source.location is None:
        raise InputError(IMPORTED_ALONE)
    if source.location is None:
        check_model_name(source.name)  # a former version may have known it
    from quest_deploy.models.pipeline_model import PipelineModel

    return PipelineModel(source, prompts, images)
