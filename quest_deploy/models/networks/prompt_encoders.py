"""A pipeline's text encoders as one module, from the token ids of prompts to a network's
conditions: what a server runs that has no pipeline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

SUFFIXES = ("", "_2", "_3")
"""Of the inputs for each tokenizer in turn: ``input_ids``, ``input_ids_2``, …"""


@dataclass(frozen=True)
class Tokens:
    """How a prompt becomes the token ids that one encoder reads.

    Attributes:
        length: what they are padded to; a prompt of more is refused.
        cut: whether the end of a longer prompt is left out instead, as another encoder reads it.
        masked: whether the encoder is told which are padding, ``attention_mask``.
        lower: whether the prompt is put into lower case and stripped first.
        before: the text before a prompt that is asked for, and not before a negative one.
        kept: where there is such a text, the number of tokens whose states the network reads,
            ``places``: the first token's and the last ones', or of a negative prompt the first
            ones'. None for all.
    """

    length: int
    cut: bool = False
    masked: bool = False
    lower: bool = False
    before: str = ""
    kept: int | None = None


class PromptEncoder(nn.Module, ABC):
    """The text encoders of one pipeline, called with the inputs of :meth:`examples` in that order.

    Attributes:
        outputs: the conditions that it gives, [B, ...], by name.
        tokens: what each tokenizer of the pipeline gives, in turn.
    """

    outputs: tuple[str, ...]
    tokens: tuple[Tokens, ...]

    @abstractmethod
    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The conditions, float32, of token ids and what belongs to them, int32 [B, length]."""

    def examples(self) -> dict[str, Tensor]:
        """Inputs of two prompts, by name."""
        found = {}
        for suffix, each in zip(SUFFIXES, self.tokens, strict=False):
            found[f"input_ids{suffix}"] = torch.zeros(2, each.length, dtype=torch.int32)
            if each.masked:
                found[f"attention_mask{suffix}"] = torch.ones(2, each.length, dtype=torch.int32)
            if each.kept is not None:
                found[f"places{suffix}"] = torch.zeros(2, each.kept, dtype=torch.int32)
        return found


def most_tokens(pipeline: Any) -> int:
    """As many as the pipeline pads prompts to, unless told otherwise."""
    return int(signature(pipeline.encode_prompt).parameters["max_sequence_length"].default)
