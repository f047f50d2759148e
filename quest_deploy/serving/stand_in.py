"""What every engine in the place of a pipeline's module has, and refuses."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from quest_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class AbsentError(InputError, AttributeError):
    """What an engine does not have of a module: ``hasattr`` finds none."""


def refusal(name: str, reason: str) -> Callable[..., NoReturn]:
    """A method called ``name`` that raises InputError for ``reason``."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise InputError(f"{name}: {reason}")

    return refuse


def own_methods(module_class: type, *bases: type) -> set[str]:
    """The names of the methods of ``module_class`` that none of its ``bases`` has."""
    return {
        name
        for name in dir(module_class)
        if inspect.isfunction(inspect.getattr_static(module_class, name))
        and not any(hasattr(base, name) for base in bases)
    }


REFUSED_OF_MODELS = (
    "compile_repeated_blocks",
    "dequantize",
    "enable_gradient_checkpointing",
    "enable_parallelism",
    "load_state_dict",
)
"""What any model of diffusers can be asked that an engine cannot do; ``__getattr__`` is not asked
for it, since the base class has it.
"""


class EngineStandIn(ModelMixin, ConfigMixin):
    """An engine in the place of a diffusers model. It has no weights.

    ``to`` moves it in name: what it is called with may be on any device and of any float type, the
    engine computes where it was built for, and the result goes back to the caller's.

    Attributes:
        fixed: why it refuses.
        harmless: the methods that do nothing, since they change nothing.
        refused_methods: the methods of the model that raise InputError.
        absent: the modules and caches that there are none of.
    """

    config_name = "config.json"  # type: ignore[assignment]
    fixed: ClassVar[str]
    harmless: ClassVar[Collection[str]] = ()
    refused_methods: ClassVar[Collection[str]] = ()
    absent: ClassVar[Collection[str]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in REFUSED_OF_MODELS if hasattr(cls, "fixed") else ():
            setattr(cls, name, refusal(name, cls.fixed))

    def __init__(self) -> None:
        super().__init__()
        # Empty: accelerate's hooks ask the first parameter of a module where it is.
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name in self.harmless:
            return lambda *arguments, **options: None
        if name in self.refused_methods:
            return refusal(name, self.fixed)
        if name in self.absent and name not in self.__dict__.get("_modules", ()):
            raise AbsentError(self.absence(name))
        return super().__getattr__(name)

    def absence(self, name: str) -> str:
        """Why there is no ``name``."""
        return f"{name}: {self.fixed}"

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Return none: the engine has no processors."""
        return {}

    @property
    def dtype(self) -> torch.dtype:
        """The type that pipelines give their latents, states and images."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Where pipelines put their latents, states and images."""
        return self._place.device
