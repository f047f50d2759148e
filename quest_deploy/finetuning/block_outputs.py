"""The outputs of a model's supervised blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quest_deploy.models.networks import kind_of


def supervised_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model``, a network, whose outputs are compared with the float model's."""
    kinds = kind_of(model).supervised_blocks
    return [module for module in model.modules() if type(module).__name__ in kinds]


class BlockOutputs:
    """Collects the outputs of a model's supervised blocks, in execution order, while the context is
    open.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = supervised_blocks(model)
        self._place = kind_of(model).supervised_output
        self._handles: list[Any] = []
        self._outputs: list[Tensor] = []

    def __enter__(self) -> BlockOutputs:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs.append(output if isinstance(output, Tensor) else output[self._place])

        self._handles = [block.register_forward_hook(hook) for block in self._blocks]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Tensor]:
        """The outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs
