"""Official checkpoints of every kind, made small: a UNet, its settings, inputs at every calibrated
timestep, and the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.importers.architecture import UNetConfig
from quest_deploy.importers.convert import Imported, import_checkpoint, rounded_layers
from quest_deploy.importers.read import OfficialCheckpoint, read
from quest_deploy.importers.settings import ImportSettings, Source
from quest_deploy.quantization.model import QuantizedModel
from tests.quest_deploy.importers.official import (
    OfficialSettings,
    Quantized,
    UNetModel,
    make_checkpoint,
    make_model,
)

SD = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 24,
    "legacy": False,
}
CLASS_CONDITIONAL = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 1,
    "use_spatial_transformer": True,
    "transformer_depth": 2,
    "context_dim": 16,
}
UNCONDITIONAL = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 2,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}
CHURCHES = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2, 3],
    "num_heads": 2,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
TIMESTEPS = (900, 500, 101)
CONTEXT_TOKENS = 5


@dataclass
class Case:
    """A made checkpoint.

    Attributes:
        options: OfficialSettings that differ from the defaults.
    """

    params: dict[str, Any]
    split: bool = False
    per_channel: bool = False
    source: Source = Source.QUEST
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def settings(self) -> OfficialSettings:
        return OfficialSettings(TIMESTEPS, **self.options)

    @cached_property
    def import_settings(self) -> ImportSettings:
        quest, s = self.source is Source.QUEST, self.settings
        timesteps = tuple(map(float, TIMESTEPS)) if quest else ()
        context = None if quest or "context_dim" not in self.params else CONTEXT_TOKENS
        bits = (s.weight_bits, s.activation_bits, s.first_last_bits, s.softmax_bits)
        return ImportSettings(self.source, timesteps, *bits, s.symmetric, context)

    @cached_property
    def config(self) -> UNetConfig:
        return UNetConfig.from_params(self.params)

    @cached_property
    def model(self) -> UNetModel:
        return make_model(self.params, split=self.split)

    @cached_property
    def inputs(self) -> dict[int, tuple[Tensor, ...]]:
        torch.manual_seed(1)
        sizes = (
            2,
            self.params["in_channels"],
            self.params["image_size"],
            self.params["image_size"],
        )

        def context() -> tuple[Tensor, ...]:
            return (
                (torch.randn(2, CONTEXT_TOKENS, self.params["context_dim"]),)
                if "context_dim" in self.params
                else ()
            )

        return {t: (torch.randn(sizes), torch.full((2,), float(t)), *context()) for t in TIMESTEPS}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        timewise = self.source is Source.QUEST
        return make_checkpoint(
            self.model, self.settings, self.inputs, per_channel=self.per_channel, timewise=timewise
        )

    def named_inputs(self, timestep: int) -> dict[str, Tensor]:
        return dict(
            zip(
                ("sample", "timestep", "encoder_hidden_states"), self.inputs[timestep], strict=False
            )
        )

    def read(self, path: Path) -> OfficialCheckpoint:
        """Write the file to ``path`` and read it."""
        torch.save(self.state, path)
        return read(path, self.config, self.import_settings)

    def imported(self, path: Path) -> tuple[OfficialCheckpoint, Imported, QuantizedModel]:
        official = self.read(path)
        imported = import_checkpoint(
            official, rounded_layers(official), self.named_inputs(TIMESTEPS[0])
        )
        return official, imported, QuantizedModel.from_checkpoint(imported.checkpoint).eval()

    @torch.no_grad()
    def run(self, timestep: int) -> tuple[Quantized, Tensor]:
        """The official model at ``timestep``: what its quantizers saw, and its output."""
        state = self.state  # made first: that loads the finetuned weights into the model
        self.model.arithmetic = run = Quantized(state, self.settings, timestep)
        return run, self.model(*self.inputs[timestep])
