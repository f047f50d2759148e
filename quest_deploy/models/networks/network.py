"""What the toolchain must know of a denoising network, said once for each kind: no other module
asks which kind it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quest_deploy.models.residuals import takes_none

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from quest_deploy.models.channels import Channels
    from quest_deploy.models.conditions import ClassLabels
    from quest_deploy.models.configurations import Configuration
    from quest_deploy.models.networks.prompt_encoders import PromptEncoder
    from quest_deploy.models.residuals import Residual

TEXT_TO_IMAGE, CLASS_CONDITIONAL, UNCONDITIONAL = (
    "text-to-image",
    "class-conditional",
    "unconditional",
)
"""What images are asked for by: a model's family."""
Config = Mapping[str, Any]
"""What a network's config.json holds."""
States = dict[str, "Tensor"]
"""Conditions by name, each [B, ...], float32."""


class Network(ABC):
    """A kind of network: diffusers' UNets, or a family of diffusion transformers.

    Its objects are called ``(sample, timestep, **conditions)``: float32 [B, C, H, W], the
    scheduler's own timesteps [B], and a tensor [B, ...] for each condition.

    Attributes:
        part: the pipeline's part that it is, and that part's folder.
        noun: what messages call it.
        class_names: the classes of such networks, in configurations and in checkpoints; diffusers'
            own first.
        configuration: what their config.json must hold.
        conditions: all conditions that one may have, as diffusers' pipelines call them.
        token_inputs: those that are [B, tokens, ...], which have as many tokens as each other.
        supervised_blocks: the classes of the blocks whose outputs are compared with the float
            model's in finetuning.
        supervised_output: which of the outputs of such a block is compared, where it has several.
        checkpointed_blocks: the classes of those that run again in the backward pass, to save
            memory.
        unused_weights: the names of weights that published files hold though nothing reads them.
        reconstructs: whether Q-Diffusion's reconstruction knows its blocks.
        flow_matching: whether its schedule is flow matching's, in sigmas, or one of betas; None
            where the scheduler's configuration says which, by use_flow_sigmas.
        takes_loras: whether LoRAs can be fused into it.
        takes_variance: whether a scheduler may be given the variance that it predicts.
        classifier_free: whether what it predicts for no prompt, or no class, guides it.
        prompt_encoder: makes of a pipeline what a package's server encodes prompts with; None where
            it joins the graphs of the pipeline's text encoders.
    """

    part: str
    noun: str
    class_names: tuple[str, ...]
    configuration: type[Configuration]
    conditions: tuple[str, ...]
    token_inputs: tuple[str, ...] = ()
    supervised_blocks: tuple[str, ...]
    supervised_output = 0
    checkpointed_blocks: tuple[str, ...]
    unused_weights: tuple[str, ...] = ()
    reconstructs = False
    flow_matching: bool | None = False
    takes_loras = False
    takes_variance = False
    classifier_free = True
    prompt_encoder: Callable[[Any], PromptEncoder] | None = None

    @abstractmethod
    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        """Raise InputError, which names the setting, where a network is not supported.

        Args:
            name: the model's.
            folder: the pipeline's.
            of_text: whether the pipeline has a text encoder.
        """

    @abstractmethod
    def channels(
        self, name: str, config: Config, pipeline: str, variance_type: str | None, *, of_text: bool
    ) -> Channels:
        """What its channels are; raise InputError where they fit no kind of model that is known.

        Args:
            pipeline: the class of the pipeline.
            variance_type: of its scheduler.
        """

    @abstractmethod
    def family(self, config: Config, *, of_text: bool) -> str:
        """What its images are asked for by: text-to-image, class-conditional or unconditional."""

    @abstractmethod
    def layer_set_name(self, family: str) -> str:
        """Which of ``quest_deploy.finetuning.layer_sets`` applies to a model of ``family``."""

    @abstractmethod
    def guidance(self, config: Config, family: str) -> float:
        """The guidance weight that it is used with; 1 is none."""

    def embeds_guidance(self, config: Config) -> bool:
        """Whether the guidance weight is a condition of its, called
        :data:`quest_deploy.models.channels.GUIDANCE`, which a single prediction heeds.
        """
        return False

    @abstractmethod
    def sides(self, config: Config, of_decoder: int | None) -> tuple[int, int]:
        """Height and width of the samples that it is meant for.

        Args:
            of_decoder: the side of the latents that the pipeline's decoder is meant for, where a
                file says it.
        """

    def schedule_tokens(self, size: tuple[int, int]) -> int | None:
        """How many tokens a sample of this height and width is, where the pipeline tells the
        scheduler by them how far to shift, and its sigmas, evenly spaced from 1 on; None where the
        scheduler's configuration says all.
        """
        return None

    def usual_steps(self, config: Config, schedule: Mapping[str, Any]) -> int | None:
        """How many steps it is used with, where that is not its pipeline's default.

        Args:
            schedule: see :func:`quest_deploy.models.schedulers.flow_schedule`.
        """
        return None

    @abstractmethod
    def sample_multiple(self, config: Config) -> int:
        """What heights and widths of the samples must be multiples of."""

    def largest_side(self, config: Config) -> int | None:
        """The largest height and width of the samples that it takes; None of one without."""
        return None

    @abstractmethod
    def build(self, class_name: str, config: Config) -> nn.Module:
        """A new network of one of ``class_names``, its weights not trained; whatever diffusers
        raises for a configuration that it cannot build.
        """

    @abstractmethod
    def flat(self, network: nn.Module) -> nn.Module:
        """The same object of diffusers', now called as this class says; weights and module names
        stay. Raise InputError where it cannot be.
        """

    def float_layers(self, config: Config) -> tuple[str, ...]:
        """The layers that stay in float unless told otherwise: globs, each of which matches."""
        return ()

    def residuals(self, config: Config, kind: str) -> dict[str, Residual]:
        """The inputs that a ``kind`` of ``quest_deploy.models.residuals.KINDS``, such as a
        ControlNet, gives a network of ``config``; raise InputError where it gives it none.
        """
        raise takes_none(config, kind)

    def labels(self, config: Config) -> ClassLabels | None:
        """The labels of a network that embeds them itself; None of another."""
        return None

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[States, States]:
        """The states of N prompts and those of none, each [N, ...], by the pipeline's own code."""
        raise TypeError(f"{self.class_names[0]} reads no prompts")

    def without_padding(self, conditions: States) -> States:
        """The ``conditions`` with nothing in the place of padding that the network does not read,
        so that statistics are of what counts alone; its prediction stays.
        """
        return conditions

    def random_states(self, config: Config, count: int, generator: torch.Generator) -> States:
        """Random normal states in the shapes of ``count`` prompts, where there is no encoder."""
        raise TypeError(f"{self.class_names[0]} reads no prompts")

    def from_pipeline(self, given: dict[str, Any]) -> dict[str, Any]:
        """What diffusers' pipeline calls its network with, as this class says: ``sample``,
        ``timestep`` and the conditions; raise InputError for what such a network cannot take.
        """
        return given

    def to_pipeline(self, prediction: Tensor) -> Tensor:
        """A prediction [B, C, H, W] as the pipeline takes it."""
        return prediction

    def of_size(self, config: Config, size: tuple[int, int], count: int) -> States:
        """What the network is told of an image's height and width, in pixels; each [count, ...]."""
        return {}
