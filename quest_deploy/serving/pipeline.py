"""A diffusers pipeline whose network, a UNet or a transformer, is an engine: schedulers, guidance,
callbacks and everything else are diffusers' own.
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from exporters.graph_info import added_inputs, load_signature
from quest_deploy.artifacts.model_source import IMAGE_ENCODER
from quest_deploy.artifacts.workspace import ENGINES, Workspace
from quest_deploy.backends.base import LOWERED
from quest_deploy.backends.engine_unet import EngineUNet
from quest_deploy.backends.registry import get_backend
from quest_deploy.errors import InputError
from quest_deploy.models.controls import check_fits, load_control
from quest_deploy.models.ip_adapters import IMAGE_PARTS, load_image_parts, load_projection
from quest_deploy.models.loading import load_model
from quest_deploy.models.networks import NETWORKS, network_of
from quest_deploy.models.pipeline_classes import controlled_class
from quest_deploy.models.residuals import (
    CONTROLNET,
    IMAGE_SCALE,
    IMAGE_TOKENS,
    KINDS,
    PARTS,
    flag,
    kind_of,
    unpacked,
)
from quest_deploy.serving.parts import engine_parts
from quest_deploy.serving.stand_in import EngineStandIn, own_methods, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from quest_deploy.artifacts.model_source import IPAdapter
    from quest_deploy.models.pipeline_model import PipelineModel

DEFAULT_BACKEND = "openvino"
_FIXED = (
    "an engine's weights and graph are fixed when it is built: give LoRAs to `quest-deploy lora`, "
    "or to `quest-deploy calibrate --lora`, IP-Adapters to `quest-deploy calibrate --ip-adapter` "
    "(their scale to `pipeline.unet.set_ip_adapter_scale`), and build the engine again; FreeU, "
    "caches, training and attention processors need the float network, in diffusers' own pipeline"
)
_IMAGES = "encoder_hid_proj"
"""The module that pipelines make tokens of an image with."""
_NO_IMAGES = (
    "the engine has no IP-Adapter, which would read the image; expected a workspace of "
    "`quest-deploy calibrate --ip-adapter`"
)
_PARTS = {part: kind for kind, part in PARTS.items()}
"""By what diffusers' pipelines call what adds to the UNet, what it is here."""
_HARMLESS = (
    "_reset_stateful_cache",
    "disable_freeu",
    "set_attention_slice",
    "set_default_attn_processor",
    "unfuse_qkv_projections",
)
"""What diffusers asks of a network to save memory, or to undo what no engine ever does."""
_ABSENT = (
    "add_embedding",
    "add_time_proj",
    "cache_context",
    "class_embedding",
    "conv_act",
    "conv_in",
    "conv_norm_out",
    "conv_out",
    "disable_cache",
    "down_blocks",
    "enable_cache",
    "encoder_hid_proj",
    "is_cache_enabled",
    "mid_block",
    "time_embedding",
    "time_proj",
    "up_blocks",
)
"""The modules of a UNet, and the caches of a transformer, which an engine does not have."""
_REFUSED = frozenset().union(
    *(
        own_methods(getattr(diffusers, name), ModelMixin, ConfigMixin)
        for kind in NETWORKS
        for name in kind.class_names
        if hasattr(diffusers, name)
    )
) - {*_HARMLESS, *_ABSENT}
"""What else a network of diffusers can be asked."""
_REFUSED_BY_PIPELINES = (
    "delete_adapters",
    "disable_lora",
    "enable_lora",
    "enable_lora_hotswap",
    "fuse_lora",
    "load_ip_adapter",
    "load_lora_weights",
    "set_adapters",
    "set_ip_adapter_scale",
    "set_lora_device",
    "unfuse_lora",
    "unload_ip_adapter",
    "unload_lora_weights",
)
"""What pipelines answer, in part, before they ask their UNet."""


def load_pipeline(
    workspace: Workspace | Path | str, backend: str = DEFAULT_BACKEND, **parts: Any
) -> Any:
    """The model's diffusers pipeline with the engine of ``backend`` as its UNet or transformer.

    The pipeline's class is the one that the model's folder names. Text encoders, decoder,
    tokenizers and scheduler come from there, with the LoRAs of the workspace; the safety checker
    does not, unless it is given. Where `quest-deploy build-parts` has run for ``backend``, text
    encoders and VAE are its engines, but for what is given in ``parts``.

    >>> pipeline = load_pipeline("quest-out/sd15-w4a4", "openvino")               # doctest: +SKIP
    >>> pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    >>> pipeline("a lighthouse in a storm", num_inference_steps=20).images[0]

    With a ControlNet it is diffusers' pipeline of that kind, the ControlNet itself in torch:

    >>> pipeline = load_pipeline("quest-out/sd15-w4a4", controlnet="canny")       # doctest: +SKIP
    >>> pipeline("a lighthouse in a storm", image=edges).images[0]                # doctest: +SKIP

    A workspace that was calibrated with an IP-Adapter takes images as diffusers does; the scale
    begins as the one of the calibration. Of pipelines that are made from it, as ``from_pipe`` does,
    ``pipeline.unet.set_ip_adapter_scale`` sets it:

    >>> pipeline.set_ip_adapter_scale(0.5)                                        # doctest: +SKIP
    >>> pipeline("a lighthouse", ip_adapter_image=photo).images[0]                # doctest: +SKIP

    Args:
        workspace: where the engine was built, open or as a path.
        parts: parts by their names in the pipeline, to take instead of the folder's;
            ``controlnet`` may be a ControlNet's folder too, or a list of several, and so may
            ``adapter``, a T2I-adapter's.

    Raises:
        InputError: there is no such engine, the model is no whole diffusers pipeline, or a
            ControlNet or T2I-adapter does not fit the model or the engine.
    """
    get_backend(backend)
    opened = workspace if isinstance(workspace, Workspace) else Workspace.open(Path(workspace))
    model = load_model(opened.source)
    model.require_weights("run as a pipeline")  # all refused before an engine is opened
    kind = model.pipeline_class()
    parts = {name: part for name, part in parts.items() if part is not None or name not in _PARTS}
    given = _PARTS.keys() & parts.keys()
    if len(given) > 1:
        raise InputError("controlnet, adapter: diffusers has no pipeline with both; give one")
    for part in given:
        parts = {**parts, part: _controls(parts[part], model, part)}
        opened.require_recorded(f"build-engine/{backend}", f"{ENGINES}/{backend}/{LOWERED}")
        taken = added_inputs(load_signature(opened.path(ENGINES, backend, LOWERED)))
        if _PARTS[part] not in map(kind_of, taken):
            raise InputError(f"{part}: {_not_exported(_PARTS[part])}")
        kind = controlled_class(kind, part)
    has_encoder = IMAGE_ENCODER in inspect.signature(kind.__init__).parameters
    takes_images = model.source.ip_adapter is not None and has_encoder
    if takes_images and not set(IMAGE_PARTS) <= parts.keys():
        parts = {**load_image_parts(model), **parts}
    engine = EngineUNet.load(opened, backend)
    engine.prepare()  # meanwhile the other parts are read
    network: Any = stand_in(engine, model.config, model.source.ip_adapter)
    with ExitStack() as undone:
        undone.push(engine)  # or it would go on in the background
        beside = engine_parts(opened, backend, without=parts)
        pipeline = model.load_pipeline(**{model.network.part: network, **beside, **parts})
        undone.pop_all()
    engine.pixels_per_latent = getattr(pipeline, "vae_scale_factor", 1)
    for name in _REFUSED_BY_PIPELINES:
        if hasattr(pipeline, name):
            setattr(pipeline, name, refusal(name, _FIXED))
    if takes_images:
        pipeline.set_ip_adapter_scale = network.set_ip_adapter_scale
    return pipeline


def _controls(given: Any, model: PipelineModel, part: str) -> Any:
    """What diffusers' pipelines take as their ``part``, of folders and modules; raise InputError
    where one does not fit the model.
    """
    if isinstance(given, list | tuple):
        if not given:
            raise InputError(f"{part}: expected one or more, found an empty list")
        return [_controls(each, model, part) for each in given]
    if isinstance(given, Path | str):
        return load_control(Path(given), model, _PARTS[part])
    several: list[Any] = [*next(given.children())] if _is_several(given) else [given]
    for each in several:
        check_fits(each, model, _PARTS[part], part)
    return given


def _is_several(given: Any) -> bool:
    return isinstance(given, diffusers.MultiControlNetModel | diffusers.MultiAdapter)


def _not_exported(kind: str) -> str:
    return (
        f"the engine has no inputs for it: run `quest-deploy export {flag(kind)}-inputs`, best "
        f"after `quest-deploy calibrate {flag(kind)}`, and build it again"
    )


class PipelineNetwork(EngineStandIn):
    """An engine in the place of a pipeline's network."""

    fixed, harmless, refused_methods, absent = _FIXED, _HARMLESS, _REFUSED, _ABSENT

    def __init__(self, engine: EngineUNet, config: Mapping[str, Any]) -> None:
        """Stand in for the network of ``config`` with ``engine``."""
        super().__init__()
        self.engine = engine
        self._network = network_of(config["_class_name"])
        self.register_to_config(**_full_config(config))

    def absence(self, name: str) -> str:
        """Why there is no ``name``."""
        return f"{self._network.part}.{name}: {_NO_IMAGES if name == _IMAGES else _FIXED}"

    def save_pretrained(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise InputError: an engine is its workspace's."""
        raise InputError(
            "save_pretrained: an engine is kept in its workspace; copy that, and load it with "
            "quest_deploy.load_pipeline"
        )

    def _predict(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        arguments: Mapping[str, Any],
        added_cond_kwargs: Mapping[str, Tensor] | None,
        residuals: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The engine's prediction for sample [B, C, H, W].

        Args:
            timestep: a number, or a tensor [], [1] or [B]; each sample has its own.
            arguments: the conditions [B, ...], where the model has them; whatever else is among
                them is None or empty.
            added_cond_kwargs: further ones.
            residuals: by the name of its input, what is added inside.

        Raises:
            InputError: an argument that the engine does not compute, such as attention's, inputs
                that are missing or of other shapes than the engine's, or a height or width that the
                network cannot divide.
        """
        given = {**arguments, **(added_cond_kwargs or {})}
        wanted = {
            name: value
            for name, value in given.items()
            if value is not None and not (isinstance(value, dict) and not value)
        }
        if unknown := sorted(wanted.keys() - set(self._network.conditions)):
            raise InputError(f"the engine does not compute {', '.join(unknown)}: {_FIXED}")
        largest = self._network.largest_side(self.config)
        if largest is not None and max(sample.shape[2:]) > largest:
            raise InputError(
                f"expected samples of at most {largest} by {largest}, for which the "
                f"{self._network.noun} has positions, found {list(sample.shape[2:])}"
            )
        steps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        steps = steps.expand(len(sample)) if len(steps) == 1 else steps
        inputs = {**wanted, **(residuals or {})}
        return self.engine(sample, steps, **inputs).to(sample.device, sample.dtype)


class PipelineUNet(PipelineNetwork):
    """An engine in the place of a pipeline's UNet."""

    def __init__(
        self, engine: EngineUNet, config: Mapping[str, Any], ip_adapter: IPAdapter | None = None
    ) -> None:
        """See :class:`PipelineNetwork`; the layers of ``ip_adapter`` are among the engine's."""
        super().__init__(engine, config)
        self.ip_adapter_scale = None if ip_adapter is None else ip_adapter.scale
        if ip_adapter is not None:
            projection = load_projection(ip_adapter)
            self.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        if config.get("addition_embed_type") == "text_time":
            # Pipelines of SDXL check by it that their conditions on the size fit.
            width = config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Predict as diffusers' UNets do; see :meth:`PipelineNetwork._predict`.

        Args:
            added_cond_kwargs: SDXL's ``text_embeds`` and ``time_ids``, and where the engine has an
                IP-Adapter CLIP's ``image_embeds`` of one image, as diffusers' pipelines give them.
            down_block_additional_residuals, mid_block_additional_residual: what ControlNets add,
                both or neither, where the engine has inputs for them.
            down_intrablock_additional_residuals: what T2I-adapters add, likewise.
        """
        residuals = self._residuals(
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
        )
        added, scale = dict(added_cond_kwargs or {}), self.ip_adapter_scale
        if scale is not None and added.get("image_embeds") is not None:
            residuals |= self._image_prompt(added.pop("image_embeds"), scale, len(sample))
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            **arguments,
        }
        output = self._predict(sample, timestep, given, added, residuals)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def set_ip_adapter_scale(self, scale: float | Sequence[float]) -> None:
        """The scale of what the IP-Adapter adds, for all of its layers; raise InputError for one
        for each of them.
        """
        given = scale[0] if isinstance(scale, list | tuple) and len(scale) == 1 else scale
        if not isinstance(given, int | float) or not math.isfinite(given):
            raise InputError(
                f"set_ip_adapter_scale: expected a finite number, since an engine has one scale "
                f"for all layers and one IP-Adapter, found {scale}"
            )
        self.ip_adapter_scale = float(given)

    def _image_prompt(self, embeds: Any, scale: float, rows: int) -> dict[str, Tensor]:
        """The IP-Adapter's inputs for diffusers' ``image_embeds``, a list of one tensor [rows, 1,
        ...]; raise InputError for several images a row.
        """
        if not isinstance(embeds, list) or len(embeds) != 1 or embeds[0].shape[:2] != (rows, 1):
            found = [list(x.shape) for x in embeds] if isinstance(embeds, list) else type(embeds)
            raise InputError(
                f"image_embeds: expected one IP-Adapter's, of one image for each of {rows} rows "
                f"(a list of one tensor [{rows}, 1, ...]), found {found}; average the embeddings "
                "of several images"
            )
        weight = next(self.encoder_hid_proj.parameters())
        (tokens,) = self.encoder_hid_proj([embeds[0].to(weight.device, weight.dtype)])
        return {IMAGE_TOKENS: tokens[:, 0], IMAGE_SCALE: torch.full((rows,), scale)}

    def _residuals(self, **arguments: Any) -> dict[str, Tensor]:
        """What ControlNets and T2I-adapters add, by the name of its input; raise InputError where
        the engine has none for it.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        found = unpacked(given)
        for kind in KINDS:
            mine = {name for name in found if kind_of(name) == kind}
            taken = {name for name in self.engine.added if kind_of(name) == kind} if mine else set()
            # A T2I-adapter may leave the middle block alone.
            if not mine <= taken or (kind == CONTROLNET and mine != taken):
                raise InputError(
                    f"the engine does not compute {', '.join(given)}: expected "
                    f"{', '.join(sorted(taken)) or 'none'}, found {', '.join(sorted(mine))}; "
                    f"{'give what belongs to its UNet' if taken else _not_exported(kind)}"
                )
        return found


class PipelineTransformer(PipelineNetwork):
    """An engine in the place of a pipeline's transformer."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor | float,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Predict as diffusers' transformers do; see :meth:`PipelineNetwork._predict`."""
        inputs = {"sample": hidden_states, "timestep": timestep, **arguments}
        given = self._network.from_pipeline(inputs)
        sample, steps = given.pop("sample"), given.pop("timestep")
        prediction = self._predict(sample, steps, given, added_cond_kwargs)
        output = self._network.to_pipeline(prediction)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Do nothing: pipelines say by it which of several predictions a cache is of, and an
        engine has none.
        """
        yield


_STAND_INS: dict[str, Any] = {"unet": PipelineUNet, "transformer": PipelineTransformer}


def stand_in(
    engine: EngineUNet, config: Mapping[str, Any], ip_adapter: IPAdapter | None = None
) -> PipelineNetwork:
    """``engine`` in the place of the network of ``config``, as a part of its pipeline; the layers
    of ``ip_adapter``, which a UNet alone can have, are among the engine's.
    """
    of_images = {} if ip_adapter is None else {"ip_adapter": ip_adapter}
    made: PipelineNetwork = _STAND_INS[network_of(config["_class_name"]).part](
        engine, config, **of_images
    )
    return made


def _full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the defaults of its diffusers class, which pipelines read too."""
    parameters = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
    defaults = {
        name: p.default
        for name, p in parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    return {
        **defaults,
        **{name: value for name, value in config.items() if not name.startswith("_")},
    }
