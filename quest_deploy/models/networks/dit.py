"""DiT of ImageNet's classes (arXiv 2212.09748): an adaptive norm with embedders of its own in each
block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.models.conditions import ClassLabels
from quest_deploy.models.networks.network import CLASS_CONDITIONAL, Config
from quest_deploy.models.networks.patch_transformers import PatchTransformers, spread, unpatched

if TYPE_CHECKING:
    from pathlib import Path


class FlatDiT(DiTTransformer2DModel):
    """A DiTTransformer2DModel, called as a UNet is; see
    :class:`quest_deploy.models.networks.network.Network`. Its samples need not be squares.
    """

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        *,
        return_dict: bool = True,
    ) -> Any:
        """Predict; ``class_labels`` are float32 [B]."""
        steps, labels = spread(timestep, sample), class_labels.long()
        hidden = self.pos_embed(sample)
        for block in self.transformer_blocks:
            hidden = block(hidden, timestep=steps, class_labels=labels)
        norm: Any = self.transformer_blocks[0].norm1
        embedded = norm.emb(steps, labels, hidden_dtype=hidden.dtype)
        shift, scale = self.proj_out_1(F.silu(embedded)).chunk(2, dim=1)
        patches = self.proj_out_2(self.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        output = unpatched(patches, sample, self.patch_size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class DiT(PatchTransformers):
    """See :class:`quest_deploy.models.networks.network.Network`."""

    class_names, flat_class = ("DiTTransformer2DModel", "FlatDiT"), FlatDiT
    conditions = ("class_labels",)
    layers = "dit"

    def check(self, name: str, config: Config, folder: Path, *, of_text: bool) -> None:
        super().check(name, config, folder, of_text=of_text)
        if of_text or config.get("num_embeds_ada_norm") is None:
            raise InputError(
                f"{name}: a transformer of DiT: expected num_embeds_ada_norm, its classes, and no "
                "text encoder"
            )

    def family(self, config: Config, *, of_text: bool) -> str:
        return CLASS_CONDITIONAL

    def guidance(self, config: Config, family: str) -> float:
        return 4.0

    def float_layers(self, config: Config) -> tuple[str, ...]:
        """See :class:`Network`: embedders, adaptive norms and what comes last."""
        return ("pos_embed.*", "*.norm1.*", "proj_out_*")

    def labels(self, config: Config) -> ClassLabels | None:
        """See :class:`Network`; the class of no class is behind the others."""
        classes = config["num_embeds_ada_norm"]
        return ClassLabels(classes, null_label=classes)
