"""The kinds of denoising networks that go through the toolchain; CONTRIBUTING.md says how to add
one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quest_deploy.errors import InputError
from quest_deploy.models.networks.dit import DiT
from quest_deploy.models.networks.flux import Flux
from quest_deploy.models.networks.pixart import PixArt
from quest_deploy.models.networks.sana import Sana
from quest_deploy.models.networks.sd3 import SD3
from quest_deploy.models.networks.unet import UNets
from quest_deploy.models.unets import recorded_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from quest_deploy.models.networks.network import Network

UNET: Network = UNets()
TRANSFORMERS: tuple[Network, ...] = (PixArt(), DiT(), SD3(), Sana(), Flux())
NETWORKS = (UNET, *TRANSFORMERS)
MISSING = {
    "Flux2Transformer2DModel": "its shared modulation, its fourth axis of positions and its "
    "decoder's latents",
    "QwenImageTransformer2DModel": "its complex rotary positions, its packed latents and, where it "
    "edits, a timestep for each token",
    "ZImageTransformer2DModel": "its complex rotary positions and its lists of samples",
    "WanTransformer3DModel": "its 3-D convolutions and, of some, a timestep for each token",
}
"""By the class of a transformer, what this version does not do of what it needs."""
_FORMER = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}
"""By norm_type, the class of what older diffusers called Transformer2DModel, as many repositories
still do.
"""


def network_of(class_name: str) -> Network:
    """The kind of the networks of class ``class_name``, diffusers' or ours; raise InputError where
    it is none.
    """
    for kind in NETWORKS:
        if class_name in kind.class_names:
            return kind
    known = ", ".join(name for kind in NETWORKS for name in kind.class_names)
    raise InputError(f"architecture: expected one of {known}, found {class_name!r}")


def kind_of(network: nn.Module) -> Network:
    """The kind of a network that is built."""
    return network_of(recorded_class(network))


def transformer_class(name: str, config: Mapping[str, Any]) -> str:
    """The class of the transformer of ``config``, in today's diffusers; raise InputError, which
    says what is missing, where it does not go through the toolchain.

    Args:
        name: the model's, for the message.
    """
    given = config.get("_class_name")
    found = given
    if given == "Transformer2DModel":
        found = _FORMER.get(str(config.get("norm_type")), given)
    if any(found in kind.class_names for kind in TRANSFORMERS):
        return str(found)
    supported = ", ".join(kind.class_names[0] for kind in TRANSFORMERS)
    why = f": this version lacks {MISSING[found]}" if found in MISSING else ""
    raise InputError(
        f"{name}: a transformer of the class {found} is not supported{why}; expected one of "
        f"{supported}, or a UNet"
    )
