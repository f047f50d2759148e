"""Pipelines from the Hugging Face Hub. Tokens (HF_TOKEN), mirrors (HF_ENDPOINT), the cache
(HF_HOME) and offline use (HF_HUB_OFFLINE) are as huggingface_hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quest_deploy.artifacts.model_source import INDEX
from quest_deploy.errors import InputError
from quest_deploy.models.configurations import read_index
from quest_deploy.models.registry import OTHERWISE

WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
CONFIGURATIONS = (INDEX, "*/*.json", "*/*.txt", "tokenizer*/*.model")
WEIGHTS = tuple(
    f"*/{name}{shard}.safetensors"
    for name in ("diffusion_pytorch_model", "model")
    for shard in ("", "-*-of-*")
)


def fetch_pipeline(repository: str, revision: str, *, weights: bool = True) -> Path:
    """The folder of a pipeline at ``revision``, named by its commit; downloaded where the cache
    does not have all of it.

    Only what is used is downloaded: the full-precision safetensors and the configurations.

    Args:
        weights: False for the configurations and tokenizers alone.

    Raises:
        InputError: the hub cannot be reached, or refuses it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what: dict[str, Any] = {
        "repo_id": repository,
        "revision": revision,
        "allow_patterns": [*CONFIGURATIONS, *(WEIGHTS if weights else ())],
        "ignore_patterns": [f"{name}/*" for name in UNUSED],
    }
    try:
        folder = Path(snapshot_download(**what, local_files_only=True))
        if folder.name == revision and _is_complete(
            folder, weights=weights
        ):  # a commit never changes, a branch may
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        folder = Path(snapshot_download(**what))
    except GatedRepoError as e:
        raise InputError(
            f"{repository}: the hub asks for its terms to be accepted there, and for a token "
            f"(HF_TOKEN); {OTHERWISE}"
        ) from e
    except RevisionNotFoundError as e:
        raise InputError(f"{repository} has no revision {revision!r} on the hub") from e
    except RepositoryNotFoundError as e:
        raise InputError(
            f"{repository}: the hub does not know it, or HF_TOKEN gives no access to it; "
            f"{OTHERWISE}"
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(
            f"{repository} is not in the cache, and the Hugging Face Hub cannot be reached "
            f"({reason}); {OTHERWISE}"
        ) from e
    if not _is_complete(folder, weights=weights):
        raise InputError(
            f"{repository} at {revision}: its copy in the cache, {folder}, is incomplete, or has "
            f"no safetensors; {OTHERWISE}"
        )
    return folder


def _is_complete(folder: Path, *, weights: bool) -> bool:
    if not (folder / INDEX).is_file():
        return False
    for name, value in read_index(folder).items():
        if not isinstance(value, list) or value[0] is None or name in UNUSED:
            continue
        if name.startswith(WITHOUT_WEIGHTS):
            if not any((folder / name).glob("*.json")):
                return False
        elif not (folder / name / "config.json").is_file() or (
            weights and not any((folder / name).glob("*.safetensors"))
        ):
            return False
    return True
