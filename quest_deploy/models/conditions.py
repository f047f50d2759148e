"""What a model can be asked for: nothing, a class, or a prompt; each as the tensors that its UNet
takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.models.channels import IMAGE_CONDITION

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Encode = Callable[[list[str]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    """From N prompts to their conditions and to the unconditional ones, each [N, ...]."""

TEXT_TOKENS = 77
"""CLIP's: what prompts are padded to."""
BLOCK = 32
"""So many prompts are encoded together, counted from the first: the states of one depend on the
list alone, and a few of a long list cost little.
"""
RANDOM_LABELS = BLOCK // 2
"""Of one block, whose random states are drawn at once."""
NO_GUIDANCE = (
    "the model has no unconditional condition, and so no classifier-free guidance: "
    "expected a guidance weight of 1 or less"
)


class Conditions(Protocol):
    """See :class:`quest_deploy.models.registry.DiffusionModel`, whose members of the same names
    these are.
    """

    @property
    def labels(self) -> int:
        """How many labels there are."""

    def of(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The conditions for ``labels`` [B], each [B, ...]."""

    def null(self, count: int) -> dict[str, Tensor]:
        """The unconditional conditions, each [count, ...]."""


class NoConditions:
    """Of an unconditional model."""

    labels = 1

    def of(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """No inputs: the model takes no condition."""
        return {}

    def null(self, count: int) -> dict[str, Tensor]:
        """Raise InputError: the model has no null condition, and so no guidance."""
        raise InputError(NO_GUIDANCE)


@dataclass(frozen=True)
class ClassLabels:
    """Of a network that embeds the class itself: ``class_labels``, float32 [B].

    Attributes:
        null_label: the class of no class; None where there is none.
    """

    labels: int
    null_label: int | None = None

    def of(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The labels as float32 [B]."""
        check_labels(labels, self.labels)
        return {"class_labels": torch.from_numpy(labels).float()}

    def null(self, count: int) -> dict[str, Tensor]:
        """The class of no class, float32 [count]; raise InputError where the model has none, and so
        no guidance.
        """
        if self.null_label is None:
            raise InputError(NO_GUIDANCE)
        return {"class_labels": torch.full((count,), float(self.null_label))}


@dataclass(frozen=True)
class ClassTokens:
    """Of a UNet that attends to a class's tokens: ``encoder_hidden_states``, float32 [B, tokens,
    D].

    Attributes:
        table: float32 [classes + 1, tokens, D]; the last row is the class of no class.
    """

    table: Tensor

    @property
    def labels(self) -> int:
        """The classes, without that of no class."""
        return len(self.table) - 1

    def of(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The tokens of the labels [B], float32 [B, tokens, D]."""
        check_labels(labels, self.labels)
        return {"encoder_hidden_states": self.table[torch.from_numpy(labels)]}

    def null(self, count: int) -> dict[str, Tensor]:
        """The tokens of no class, float32 [count, tokens, D]."""
        return {"encoder_hidden_states": self.table[-1:].repeat(count, 1, 1)}


class Prompts:
    """Of a text-to-image model: the text encoders' states of a list of prompts, computed when one
    of their block is first asked for.

    The encoders are loaded for each call that asks for new blocks, and not kept: a large model's
    would fill the memory beside its UNet. Ask for many labels at once.
    """

    def __init__(self, prompts: Sequence[str], encode: Encode) -> None:
        self.prompts, self._encode = list(prompts), encode
        self._states: dict[int, dict[str, Tensor]] = {}
        self._null: dict[str, Tensor] = {}

    @property
    def labels(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def of(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The states of the prompts with these numbers."""
        check_labels(labels, self.labels)
        self._encode_blocks({label // BLOCK for label in labels.tolist()})
        states = [self._states[label] for label in labels.tolist()]
        return {name: torch.stack([each[name] for each in states]) for name in self._null}

    def null(self, count: int) -> dict[str, Tensor]:
        """The states of no prompt."""
        self._encode_blocks({0})
        return {
            name: value.repeat(count, *[1] * (value.dim() - 1))
            for name, value in self._null.items()
        }

    def _encode_blocks(self, blocks: set[int]) -> None:
        # The first block gives the states of no prompt, whatever is asked for first.
        blocks = {0, *blocks}
        missing = [i for i in range(self.labels) if i // BLOCK in blocks and i not in self._states]
        if missing:
            states, null = self._encode([self.prompts[i] for i in missing])
            self._null = self._null or {name: value[:1] for name, value in null.items()}
            for row, i in enumerate(missing):
                self._states[i] = {name: value[row] for name, value in states.items()}


class WithImages:
    """Of a model that inpaints or edits: label l is the prompt and the image of that number, each
    counted from the start again where there are fewer.
    """

    def __init__(self, asked: Conditions, images: int, encode: Callable[[int], Tensor]) -> None:
        """Put ``images`` images beside ``asked``; ``encode`` gives the condition of one, [C, H, W],
        by its number.
        """
        self._asked, self._images, self._encode = asked, images, functools.cache(encode)

    @property
    def labels(self) -> int:
        """How many there are of prompts or of images, whichever are more."""
        return max(self._asked.labels, self._images)

    def of(self, labels: NDArray[np.int64]) -> dict[str, Tensor]:
        """The prompts' states and the images' condition."""
        check_labels(labels, self.labels)
        images = torch.stack([self._encode(int(label) % self._images) for label in labels])
        return {**self._asked.of(labels % self._asked.labels), IMAGE_CONDITION: images}

    def null(self, count: int) -> dict[str, Tensor]:
        """The states of no prompt; the image stays what it is."""
        return self._asked.null(count)


def random_prompts(draw: Callable[[int, torch.Generator], dict[str, Tensor]], seed: int) -> Prompts:
    """Prompts whose states are random, where there is no text encoder; ``draw`` gives those of so
    many.
    """

    def encode(prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        asked, unasked = (draw(len(prompts), generator) for _ in range(2))
        return asked, unasked

    return Prompts([""] * RANDOM_LABELS, encode)


def states_width(config: Mapping[str, Any]) -> int:
    """How many values each of ``encoder_hidden_states`` has in a UNet of ``config``, which may say
    it for each level; raise InputError where the levels read different ones.
    """
    width = config["cross_attention_dim"]
    found = set(width if isinstance(width, list | tuple) else [width])
    if len(found) != 1:
        raise InputError(
            f"cross_attention_dim {width}: expected the same one at every level, which all read "
            "the same states"
        )
    return int(found.pop())


def time_ids(height: int, width: int) -> Tensor:
    """SDXL's condition on the picture's size, [1, 6]: it had these pixels, was not cropped, and is
    to have them.
    """
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def check_labels(labels: NDArray[np.int64], count: int) -> None:
    """Raise InputError for a label outside 0..count-1."""
    if labels.size and not (labels.min() >= 0 and labels.max() < count):
        raise InputError(f"labels must be 0 to {count - 1}, found {sorted(set(labels.tolist()))}")
