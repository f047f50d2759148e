"""What an official checkpoint does not say about itself, and what follows from it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from quest_deploy.artifacts.schema import Bits, Positive, one_of, parse, validated
from quest_deploy.errors import InputError
from quest_deploy.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

FIRST_AND_LAST = ("input_blocks.0.0.act_quantizer", "out.2.act_quantizer")


class Source(StrEnum):
    """The code that wrote the checkpoint."""

    QUEST = "quest"
    """One scale for each calibrated timestep, per tensor or per channel."""
    QDIFF = "qdiff"
    """One scale for all timesteps, per tensor."""


@validated("the checkpoint's settings")
@dataclass(frozen=True)
class ImportSettings:
    """The command line that made the checkpoint.

    Attributes:
        timesteps: the calibrated ones, largest first, as the checkpoint's tables have them; empty
            for Q-Diffusion.
        weight_bits: of all layers.
        activation_bits: of layer inputs and of attention's q, k and v.
        first_last_bits: of the inputs of the first and the last convolution.
        softmax_bits: 16 where the official commands switch the quantization of the softmax off,
            which leaves a fine one.
        symmetric: whether activations are (``--a_sym``).
        context_tokens: the length of the text or class condition; only where the checkpoint's
            tables do not show it.
    """

    source: Source
    timesteps: tuple[Annotated[float, Field(ge=0, lt=2**31)], ...]
    weight_bits: Bits
    activation_bits: Bits
    first_last_bits: Bits
    softmax_bits: Annotated[int, one_of(4, 8, 16)]
    symmetric: bool
    context_tokens: Positive | None = None

    def __post_init__(self) -> None:
        if any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise ValueError(
                "timesteps: expected them largest first, as the checkpoint's tables are ordered, "
                f"found {self.timesteps}"
            )
        if bool(self.timesteps) != (self.source is Source.QUEST):
            expected = (
                "the calibrated timesteps"
                if self.source is Source.QUEST
                else "no timesteps: one scale serves all of them"
            )
            raise ValueError(f"timesteps: a checkpoint of {self.source.value} needs {expected}")

    @classmethod
    def gather(cls, source: Source, options: dict[str, Any], file: Path | None) -> ImportSettings:
        """Settings from ``options`` (None: not given) and a JSON ``file`` of the same names, which
        the options go before.

        Raises:
            InputError: a setting that is given by neither, or is unknown or wrong; nothing is
                guessed.
        """
        given = {} if file is None else read_json(file)
        names = {f.name for f in dataclasses.fields(cls)} - {"source"}
        if not isinstance(given, dict) or given.keys() - names:
            raise InputError(
                f"{file}: expected a JSON object of {', '.join(sorted(names))}, found "
                f"{', '.join(sorted(given)) if isinstance(given, dict) else type(given).__name__}"
            )
        given |= {name: value for name, value in options.items() if value is not None}
        if source is Source.QDIFF:
            given.setdefault("timesteps", ())
        missing = sorted(names - given.keys() - {"context_tokens"})
        if missing:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise InputError(
                f"the checkpoint does not say how it was made; give {named} (or --settings with a "
                "JSON file of them)"
            )
        return parse(cls, {"source": source, **given}, "the checkpoint's settings")

    def code_range(self, quantizer: str) -> tuple[int, int]:
        """The codes that an activation quantizer clamps to, its zero-point included, by its CompVis
        name.

        QuEST's scripts overwrite the number of levels of the first and the last layer's quantizers
        whatever the activations' bits, which makes symmetric ones clamp to -257..256. Unconditional
        models' softmax is never symmetric.
        """
        bits, symmetric = self.activation_bits, self.symmetric
        if quantizer in FIRST_AND_LAST and (
            self.source is Source.QUEST or self.first_last_bits != bits
        ):
            bits = self.first_last_bits
            return (-(2**bits) - 1, 2**bits) if symmetric else (0, 2**bits - 1)
        if quantizer.endswith("act_quantizer_w"):
            bits, symmetric = self.softmax_bits, symmetric and "smv_matmul" not in quantizer
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)

    def bits(self, quantizer: str) -> int:
        """The bits of an activation quantizer, by its CompVis name."""
        if quantizer.endswith("act_quantizer_w"):
            return self.softmax_bits
        return self.first_last_bits if quantizer in FIRST_AND_LAST else self.activation_bits
