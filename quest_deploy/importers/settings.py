"""What an official checkpoint does not say about itself, and what follows from it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError
from quest_deploy.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

BITS = (4, 8)
SOFTMAX_BITS = (4, 8, 16)
FIRST_AND_LAST = ("input_blocks.0.0.act_quantizer", "out.2.act_quantizer")


class Source(StrEnum):
    """The code that wrote the checkpoint."""

    QUEST = "quest"
    """One scale for each calibrated timestep, per tensor or per channel."""
    QDIFF = "qdiff"
    """One scale for all timesteps, per tensor."""


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
    timesteps: tuple[float, ...]
    weight_bits: int
    activation_bits: int
    first_last_bits: int
    softmax_bits: int
    symmetric: bool
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("weight_bits", BITS),
            ("activation_bits", BITS),
            ("first_last_bits", BITS),
            ("softmax_bits", SOFTMAX_BITS),
        ):
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                raise InputError(
                    f"{name}: expected one of {', '.join(map(str, allowed))}, not {value!r}"
                )
        if type(self.symmetric) is not bool:
            raise InputError(f"symmetric: expected true or false, not {self.symmetric!r}")
        if self.context_tokens is not None and (
            type(self.context_tokens) is not int or self.context_tokens < 1
        ):
            raise InputError(
                f"context_tokens: expected a positive integer, not {self.context_tokens!r}"
            )
        if any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise InputError(
                "timesteps: expected them largest first, as the checkpoint's tables are ordered, "
                f"found {self.timesteps}"
            )
        if bool(self.timesteps) != (self.source is Source.QUEST):
            wanted = (
                "the calibrated timesteps"
                if self.source is Source.QUEST
                else "no timesteps: one scale serves all of them"
            )
            raise InputError(f"timesteps: a checkpoint of {self.source.value} needs {wanted}")

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
                f"{file}: expected a JSON object with some of the keys {', '.join(sorted(names))}"
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
        timesteps = given.pop("timesteps")
        if not isinstance(timesteps, list | tuple) or any(
            type(t) not in (int, float) or not 0 <= t < 2**31 for t in timesteps
        ):
            raise InputError(
                f"timesteps: expected a list of numbers of 0 or more, found {timesteps!r}"
            )
        return cls(source, tuple(float(t) for t in timesteps), **given)

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
