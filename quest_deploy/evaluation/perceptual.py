"""Metrics whose networks were trained elsewhere: LPIPS, the CLIP score and the Frechet inception
distance. Each is measured only where the user names its weights; nothing is fetched.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from quest_deploy.artifacts.image_folder import SUFFIXES
from quest_deploy.backends.base import require_package
from quest_deploy.errors import InputError
from quest_deploy.files import check_archive
from quest_deploy.models.image_inputs import read_image
from quest_deploy.models.pipeline_model import quiet
from quest_deploy.models.tokenizers import check_tokenizer
from quest_deploy.models.weights import check_weights, load_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LPIPS, CLIP, FID = "lpips", "clip_score", "fid"
"""What a report calls the metrics."""
BATCH = 32
_LARGE = 64
"""Pixels of an image's side that every backbone of LPIPS takes."""


@dataclass(frozen=True)
class Weights:
    """Where the metrics' weights are; None of one that is not measured.

    Attributes:
        clip: a folder with a CLIP model, in transformers' layout.
        lpips: torchvision's file of an AlexNet or a VGG-16, the backbone of LPIPS.
        fid: a folder of real images.
        inception: torch-fidelity's file of an Inception v3, which sees them.
    """

    clip: Path | None = None
    lpips: Path | None = None
    fid: Path | None = None
    inception: Path | None = None

    def __post_init__(self) -> None:
        if (self.fid is None) != (self.inception is None):
            given, missing, what = (
                ("--fid", "--inception", "torch-fidelity's file of an Inception v3")
                if self.inception is None
                else ("--inception", "--fid", "a folder of real images")
            )
            raise InputError(f"{given}: expected {missing} too, {what}; {missing} is missing")


class Perceptual:
    """The metrics of ``weights``, loaded before anything is drawn."""

    def __init__(self, weights: Weights, size: tuple[int, int], *, of_text: bool) -> None:
        """Load the networks, and try them.

        Args:
            size: height and width of the images to come.

        Raises:
            InputError: a package is not installed; a file or folder is not what its option
                expects; the images are too small for LPIPS; or the CLIP score is asked of a model
                that draws nothing from text.
        """
        if weights.clip is not None and not of_text:
            raise InputError("--clip: expected a text-to-image model")
        self._clip = None if weights.clip is None else _ClipScore(weights.clip)
        self._lpips = None if weights.lpips is None else _lpips(weights.lpips, size)
        self._fid = (
            None
            if weights.fid is None or weights.inception is None
            else _fid(weights.fid, weights.inception)
        )

    @torch.no_grad()
    def __call__(
        self,
        images: NDArray[np.float32],
        captions: Sequence[str],
        fp32_images: NDArray[np.float32],
    ) -> dict[str, float]:
        """Judge images [N, C, H, W] in [-1, 1], C 1 or 3, drawn from ``captions`` [N]; LPIPS is to
        FP32's images of the same noise.
        """
        found = {}
        if self._clip is not None:
            found[CLIP] = self._clip(images, captions)
        if self._lpips is not None:
            found[LPIPS] = self._distance(images, fp32_images)
        if self._fid is not None:
            self._fid.reset()  # but for the real images' statistics
            for batch in torch.from_numpy(_bytes(images)).split(BATCH):
                self._fid.update(batch, real=False)
            found[FID] = float(self._fid.compute())
        return found

    def _distance(self, images: NDArray[np.float32], others: NDArray[np.float32]) -> float:
        assert self._lpips is not None
        a, b = (torch.from_numpy(_coloured(x)).clamp(-1, 1) for x in (images, others))
        pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
        return float(torch.cat([self._lpips(x, y).flatten() for x, y in pairs]).mean())


class _ClipScore:
    """100 times the cosine between an image's embedding and its prompt's, mean over the images, at
    least 0 (Hessel et al., 2021), as torchmetrics has it.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise InputError(
                f"--clip {folder}: expected a folder with a CLIP model in transformers' layout; "
                "download openai/clip-vit-base-patch16, say, and give its folder"
            )
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        check_tokenizer(folder)
        try:
            with quiet():
                self._model = load_part(folder, CLIPModel)
                self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                self._prepare = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
            # Many a tokenizer's configuration says no length.
            self._tokenizer.model_max_length = min(
                self._tokenizer.model_max_length,
                self._model.config.text_config.max_position_embeddings,
            )
            self(np.zeros((1, 3, _LARGE, _LARGE), np.float32), [""])
        except InputError:
            raise
        except Exception as e:  # of files that do not belong together, transformers raises anything
            reason = " ".join(str(e).split())[:300]
            raise InputError(
                f"--clip {folder}: expected a CLIP model, its tokenizer and its image processor "
                f"({type(e).__name__}: {reason}); get it again"
            ) from e

    @torch.no_grad()
    def __call__(self, images: NDArray[np.float32], captions: Sequence[str]) -> float:
        cosines = []
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            pixels = self._prepare(list(_bytes(images[rows])), return_tensors="pt").pixel_values
            words = self._tokenizer(
                list(captions[rows]), return_tensors="pt", padding=True, truncation=True
            )
            seen = self._model.get_image_features(pixels).pooler_output
            asked = self._model.get_text_features(**words).pooler_output
            cosines.append(torch.cosine_similarity(seen, asked))
        return max(0.0, 100 * float(torch.cat(cosines).mean()))


def _lpips(path: Path, size: tuple[int, int]) -> Any:
    """LPIPS with the backbone of ``path`` and the linear layers that torchmetrics has, for images
    of ``size``.
    """
    state = _state_dict(path, "--lpips")
    require_package("torchvision", "metrics", "--lpips")
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    net: Literal["alex", "vgg"] = "vgg" if "features.28.weight" in state else "alex"
    model = _NoTrainLpips(net=net, pnet_rand=True)
    names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    try:
        model.net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    except (KeyError, RuntimeError) as e:
        raise InputError(
            f"--lpips {path}: expected torchvision's weights of an AlexNet or a VGG-16 ({e})"
        ) from e
    check_weights(model.net, f"--lpips {path}")
    trial = torch.zeros(1, 3, *(min(side, _LARGE) for side in size))
    try:
        with torch.no_grad():
            model(trial, trial)
    except RuntimeError as e:
        raise InputError(
            f"--lpips: images of {size[0]}x{size[1]} pixels are too small for its backbone ({e})"
        ) from e
    return model


def _fid(folder: Path, weights: Path) -> Any:
    """torchmetrics' Frechet inception distance, with the statistics of the images in ``folder``."""
    found = sorted(folder.glob("*")) if folder.is_dir() else []
    files = [path for path in found if path.suffix.lower() in SUFFIXES]
    if len(files) < 2:
        raise InputError(
            f"--fid {folder}: expected a folder of 2 images or more, found "
            f"{len(files) if folder.is_dir() else 'a file'}"
        )
    state = _state_dict(weights, "--inception")
    require_package("torch_fidelity", "metrics", "--fid")
    from torchmetrics.image.fid import FrechetInceptionDistance

    with tempfile.NamedTemporaryFile(suffix=".pth") as safe:
        # The library unpickles what it is given: it is given what was read as tensors alone.
        torch.save(state, safe)
        safe.flush()
        try:
            metric = FrechetInceptionDistance(
                reset_real_features=False, feature_extractor_weights_path=safe.name
            )
        except RuntimeError as e:
            raise InputError(
                f"--inception {weights}: expected torch-fidelity's weights of an Inception v3"
            ) from e
    check_weights(metric.inception, f"--inception {weights}")
    with torch.no_grad():
        for path in files:  # which may differ in size
            pixels = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)
            metric.update(pixels[None], real=True)
    return metric


def _state_dict(path: Path, flag: str) -> dict[str, Tensor]:
    """The tensors of a .pth file, which may hold nothing else."""
    if path.is_dir():
        raise InputError(f"{flag} {path}: expected a .pth file of weights, found a folder")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as e:
        raise InputError(f"{flag} {e}") from e
    except Exception as e:  # a malformed file makes torch and pickle raise anything
        # Not torch's own words, which advise to run the file's code.
        reason = e if isinstance(e, OSError) else type(e).__name__
        raise InputError(f"{flag} {path}: expected a .pth file of weights alone ({reason})") from e
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"{flag} {path}: expected a .pth file with a state dict of tensors")
    return state


def _coloured(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The images with three channels."""
    return np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images


def _bytes(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [N, 3, H, W] of images in [-1, 1]."""
    return np.round((_coloured(images) + 1) * 127.5).clip(0, 255).astype(np.uint8)
