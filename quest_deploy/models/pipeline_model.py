"""A diffusers pipeline as a model of the toolchain: from a folder, the hub, a single file, or an
architecture with random weights.

Its network, a UNet or a transformer, goes through the toolchain; text encoders, decoder, tokenizers
and scheduler stay what they are and run beside the engine. What is peculiar to a kind of network is
said in :mod:`quest_deploy.models.networks`.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from quest_deploy.artifacts.tensors import read_tensors
from quest_deploy.errors import InputError
from quest_deploy.models.channels import EDITING, INPAINTING
from quest_deploy.models.conditions import (
    BLOCK,
    NO_GUIDANCE,
    ClassTokens,
    NoConditions,
    Prompts,
    WithImages,
    random_prompts,
    states_width,
)
from quest_deploy.models.configurations import (
    Configuration,
    DecoderConfiguration,
    SchedulerConfiguration,
    parse_configuration,
    read_configuration,
    read_index,
)
from quest_deploy.models.hub import fetch_pipeline
from quest_deploy.models.image_inputs import (
    ImageInput,
    made_image,
    random_condition,
    read_images,
)
from quest_deploy.models.ip_adapters import IMAGE_PARTS, add_ip_adapter, check_model
from quest_deploy.models.loras import check_parts, fuse
from quest_deploy.models.networks import UNET, network_of, transformer_class
from quest_deploy.models.networks.network import CLASS_CONDITIONAL, TEXT_TO_IMAGE, UNCONDITIONAL
from quest_deploy.models.pipeline_classes import CONTROLLED, controlled_class, drawn_class
from quest_deploy.models.registry import (
    ARCHITECTURES,
    KNOWN_MODELS,
)
from quest_deploy.models.schedulers import (
    FLOW,
    flow_sampler,
    flow_schedule,
    make_scheduler,
    noise_schedule,
)
from quest_deploy.models.single_file import SingleFile, read_single_file
from quest_deploy.models.tokenizers import (
    TOKENIZERS,
    bound_tokenizers,
    check_tokenizer,
    tell_cut,
)
from quest_deploy.models.unets import set_heads
from quest_deploy.models.weights import (
    check_memory,
    check_weights,
    in_float32,
    load_part,
    load_single_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from quest_deploy.artifacts.image_folder import ImageFolder
    from quest_deploy.artifacts.model_source import ModelSource
    from quest_deploy.models.conditions import Conditions
    from quest_deploy.models.networks.network import Network
    from quest_deploy.models.registry import KnownModel

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DECODERS = ("vae", "vqvae")
PROMPTS = "prompts.txt"
"""What a text-to-image model is asked for where the user names nothing, a prompt a line."""
CLASS_EMBEDDING = "class_embedding.safetensors"
"""In the folder of a class-conditional model: "weight", float32 [classes + 1, tokens x D], its last
row the class of no class.
"""
IMAGE_GUIDANCE = 1.5
"""What instruct-pix2pix models are used with, beside the weight of the text."""
IMAGENET_CLASSES = 1000
STEPS = 20
"""What images are drawn with, of a model that is not of few steps."""


class PipelineModel:
    """See :class:`quest_deploy.models.registry.DiffusionModel`.

    Attributes:
        source: where it comes from.
        folder: the pipeline's folder, or the architecture's where only that is known.
        single_file: the file that holds the weights of all parts, if that is where they come from.
        index: model_index.json: each part's library and class.
        network: the kind of its network.
        config: the network's configuration.
        channels: what the network's channels are.
    """

    calibration_steps, calibration_scheduler = 20, "ddim"

    def __init__(
        self,
        source: ModelSource,
        prompts: Sequence[str] | None = None,
        images: ImageFolder | None = None,
    ) -> None:
        """See :func:`quest_deploy.models.loading.load_model`."""
        source.check_unchanged()
        self.source, self.name = source, source.name
        self.single_file = (
            source.path if source.path is not None and source.path.is_file() else None
        )
        self._file = (
            None
            if self.single_file is None
            else read_single_file(self.single_file, source.prediction_type)
        )
        self.folder = _folder_of(source, self._file)
        self.index = read_index(self.folder)
        self.network, self.config = self._read_network()
        # Of published weights: no setting of diffusers' classes.
        half = self.config.pop("torch_dtype", None) == "bfloat16"
        self._published_type = torch.bfloat16 if half else torch.float32
        if self._file is not None:
            self._apply(self._file)
        of_text = any(self.index.get(name, [None])[0] is not None for name in TEXT_ENCODERS)
        self.network.check(self.name, self.config, self.folder, of_text=of_text)
        if source.loras and not self.network.takes_loras:
            raise InputError(
                f"--lora: expected a model with a UNet, and {self.name} has a {self.network.noun}"
            )
        # What the network lacks says more than the class of its pipeline.
        with quiet():  # importing it tells of torchvision, which nothing here uses
            self.index["_class_name"] = drawn_class(self.name, self.index, self.network.part)
        self.family = self.network.family(self.config, of_text=of_text)
        self.layer_set_name = self.network.layer_set_name(self.family)
        self.asked_for = self._asked_for()
        if prompts is not None and self.family != TEXT_TO_IMAGE:
            raise InputError(
                f"--prompts: expected a text-to-image model, and {self.name} is {self.family}"
            )
        decoder = self.folder / (self._decoder or "vae") / "config.json"
        self._decoder_config = (
            read_configuration(DecoderConfiguration, decoder) if decoder.exists() else None
        )
        size = self.network.sides(self.config, self._decoder_side())
        self._schedule = self._read_schedule(self.network.schedule_tokens(size))
        self.steps = self.network.usual_steps(self.config, self._schedule) or STEPS
        self.bucket_steps: int | None = None
        if self._schedule.get("prediction_type") == FLOW:
            self.bucket_steps = self.calibration_steps = self._usual_steps()
            self.calibration_scheduler = flow_sampler(self._schedule)
        self.channels = self.network.channels(
            self.name,
            self.config,
            self.index["_class_name"],
            self._schedule.get("variance_type"),
            of_text=self.family == TEXT_TO_IMAGE,
        )
        self._given_prompts = prompts
        self._conditions: Conditions | None = None
        self._told_cut = False
        self.sample_shape: tuple[int, ...] = (self.channels.sampled, *size)
        if images is not None and not self.channels.image:
            raise InputError(
                f"--image-folder: expected a model that inpaints or edits images, not {self.name}"
            )
        self._given_images = images
        self.train_timesteps: int = self._schedule["num_train_timesteps"]
        self.guidance = self.network.guidance(self.config, self.family)
        self.classifier_free = self.network.classifier_free
        self.embeds_guidance = self.network.embeds_guidance(self.config)
        editing = self.channels.image_kind == EDITING
        self.image_guidance: float | None = IMAGE_GUIDANCE if editing else None
        # A forward pass of Stable Diffusion takes seconds on a CPU, one of a latent-diffusion UNet
        # about one.
        self.calibration_samples = 2 if self.guidance != 1 and self.classifier_free else 4
        self.forward_rows: int | None = 2 if self.family == TEXT_TO_IMAGE else 4
        self.evaluation_images = 4
        self.eight_bit_layers: Sequence[str] = ()
        self.float_layers: Sequence[str] = self.network.float_layers(self.config)
        self.finetuning: Mapping[str, Any] = {}
        self.finetuning_threads: int | None = None
        if source.ip_adapter is not None:
            check_model(source.ip_adapter, self)
        for name, value in {} if self._known is None else self._known.defaults.items():
            setattr(self, name, value)

    def load_unet(self, *, narrow: bool = False) -> nn.Module:
        """The float model, its LoRAs fused, with its IP-Adapter's keys and values; random weights
        are those of the source's seed, of the type of the published ones.

        Args:
            narrow: keep weights in bfloat16 that are so in their files, see
                :func:`quest_deploy.models.weights.in_float32`; they are to be read, not changed.
        """
        class_name, part = self.config["_class_name"], self.network.part
        narrow = narrow and not self.source.loras and self.source.ip_adapter is None
        with self._loading(f"the {self.network.noun}"):
            if self.source.random_weights:
                dtype = self._published_type
                with torch.device("meta"):
                    empty = self.network.build(class_name, self.config)
                elements = sum(p.numel() for p in empty.parameters())
                narrow = narrow and dtype is torch.bfloat16
                check_memory(elements, self.name, narrow=narrow)
                with torch.random.fork_rng(devices=[]), default_type(dtype):
                    torch.manual_seed(self.source.seed)
                    network = self.network.build(class_name, self.config)
                network = in_float32(network, narrow=narrow)
            elif self.single_file is not None:
                kind = getattr(diffusers, class_name)
                network = load_single_file(self.single_file, kind, self.folder, part)
            else:
                network = load_part(
                    self.folder / part,
                    getattr(diffusers, class_name),
                    whole=True,
                    unused=self.network.unused_weights,
                    narrow=narrow,
                )
        if self._known is not None and self._known.heads is not None:
            set_heads(network, self._known.heads)
        if self.source.loras:
            self._check_loras()
            fuse(self.source.loras, part, network)
        if self.source.ip_adapter is not None:
            add_ip_adapter(network, self.source.ip_adapter)
        return self.network.flat(network).eval()

    def load_scheduler(self, name: str, **overrides: Any) -> Any:
        """See :class:`quest_deploy.models.registry.DiffusionModel`."""
        return make_scheduler(name, {**self.scheduler_config(), **overrides})

    @property
    def labels(self) -> int:
        """How many labels there are."""
        return self._asked.labels

    def draw_conditions(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Labels in a random order, none a second time before all have come."""
        rounds = -(-count // self.labels)
        drawn = torch.cat(
            [torch.randperm(self.labels, generator=generator) for _ in range(rounds)]
        )[:count]
        return self.conditions(drawn.numpy())

    def conditions(self, labels: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """See :class:`quest_deploy.models.registry.DiffusionModel`."""
        return self._asked.of(labels)

    def null_conditions(self, count: int) -> dict[str, torch.Tensor]:
        """See :class:`quest_deploy.models.registry.DiffusionModel`."""
        if not self.classifier_free:
            raise InputError(NO_GUIDANCE)
        return self._asked.null(count)

    def without_padding(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`quest_deploy.models.registry.DiffusionModel`."""
        return self.network.without_padding(conditions)

    def images(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode one by one, which bounds memory; a model without a decoder works on pixels."""
        self.require_weights("draw")
        decoder = self.load_decoder()
        if decoder is None:
            return np.clip(latents, -1.0, 1.0)
        with torch.no_grad():
            decoded = [
                decoder.decode(unscaled(decoder, row[None])).sample
                for row in torch.from_numpy(latents)
            ]
        images: NDArray[np.float32] = torch.cat(decoded).clamp(-1, 1).numpy()
        return images

    @property
    def prompts(self) -> list[str]:
        """The prompts that labels stand for, of a text-to-image model."""
        if self._given_prompts is not None:
            return list(self._given_prompts)
        own = self.folder / PROMPTS
        path = own if self.embedded and own.exists() else Path(__file__).parent / PROMPTS
        return path.read_text(encoding="utf-8").splitlines()

    @property
    def embedded(self) -> bool:
        """Whether the package itself has the model."""
        return self._known is not None and self._known.folder is not None

    @property
    def judge_folder(self) -> Path | None:
        """What judges its images, see :class:`quest_deploy.evaluation.retrieval.Judge`; None where
        nothing does.
        """
        whole = self.embedded and not self.source.random_weights and self._given_prompts is None
        return self.folder / "judge" if whole else None

    @property
    def _known(self) -> KnownModel | None:
        """The registry's entry; None of a folder or file, which may be called like a model."""
        return None if self.source.path is not None else KNOWN_MODELS.get(self.name)

    def pipeline_class(self) -> Any:
        """The diffusers class of the pipeline; raise InputError where diffusers has none for this
        model.
        """
        name = self.index.get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
            raise InputError(
                f"{self.name}: diffusers has no pipeline called {name}; use "
                "quest_deploy.backends.engine_unet.EngineUNet, or `generate`"
            )
        return found

    def load_pipeline(self, *, narrow: bool = False, **parts: Any) -> Any:
        """The diffusers pipeline, its LoRAs fused into the text encoders.

        Args:
            narrow: keep weights of text encoders in bfloat16 that are so in their files, see
                :func:`quest_deploy.models.weights.in_float32`.
            parts: by name, parts to take instead of the folder's; None leaves one away. Without
                ``unet``, or ``transformer``, there is none; with ``controlnet`` or ``adapter`` it
                is a pipeline that has one.
        """
        self.require_weights("run as a pipeline")
        pipeline_class = self.pipeline_class()
        narrow = narrow and not self.source.loras  # which change them
        parts = {name: x for name, x in parts.items() if x is not None or name not in CONTROLLED}
        for part in CONTROLLED.keys() & parts.keys():
            pipeline_class = controlled_class(pipeline_class, part)
        given = {self.network.part: None, **parts}
        if "safety_checker" in self.index and "safety_checker" not in given:
            given |= {"safety_checker": None, "requires_safety_checker": False}
            given |= {
                name: None  # they serve the checker alone
                for name in IMAGE_PARTS
                if name in self.index and name not in given and not (self.folder / name).is_dir()
            }
        with self._loading("the pipeline"):
            if self._file is not None or self.source.prediction_type is not None:
                # The folder's, or the architecture's, may say something else of what is predicted.
                kind = getattr(diffusers, self.index["scheduler"][1])
                given.setdefault("scheduler", kind.from_config(self.scheduler_config()))
            if self.single_file is not None:
                # A single file holds no tokenizer: that and the configurations are the
                # architecture's own on the hub.
                config = self._fetch_configurations()
                pipeline = pipeline_class.from_single_file(
                    str(self.single_file), config=str(config), local_files_only=True, **given
                )
                for name in (*TEXT_ENCODERS, *DECODERS):
                    if name not in parts and getattr(pipeline, name, None) is not None:
                        check_weights(getattr(pipeline, name), f"{self.single_file}, its {name}")
            else:
                for name in (*TEXT_ENCODERS, *DECODERS):
                    library, kind = self.index.get(name, (None, None))
                    if library in ("diffusers", "transformers") and name not in given:
                        part_class = getattr(importlib.import_module(library), kind)
                        held = narrow and name in TEXT_ENCODERS
                        given[name] = load_part(self.folder / name, part_class, narrow=held)
                for name in TOKENIZERS:
                    if self.index.get(name, [None])[0] is not None and name not in given:
                        check_tokenizer(self.folder / name)
                pipeline = pipeline_class.from_pretrained(
                    self.folder, use_safetensors=True, local_files_only=True, **given
                )
        for name in TEXT_ENCODERS:
            if name not in parts and getattr(pipeline, name, None) is not None:
                fuse(self.source.loras, name, getattr(pipeline, name))
        bound_tokenizers(pipeline)
        return pipeline

    def check_text_encoders(self) -> None:
        """Raise InputError where the text encoders, if there are any, cannot be loaded, or a LoRA
        does not fit one of them.
        """
        if self.family == TEXT_TO_IMAGE and not self.source.random_weights:
            self._load_encoders()

    def _load_encoders(self) -> Any:
        """The pipeline as far as it encodes prompts."""
        unused: dict[str, Any] = {x: None for x in ("vae", *IMAGE_PARTS) if x in self.index}
        return self.load_pipeline(**unused)

    def _check_loras(self) -> None:
        """Raise InputError where the pipeline takes no LoRAs, or one has weights for a part that
        the pipeline does not have.
        """
        pipeline_class = self.pipeline_class()
        if not hasattr(pipeline_class, "load_lora_weights"):
            raise InputError(
                f"--lora: expected a pipeline that takes LoRAs, and {pipeline_class.__name__} does "
                "not"
            )
        encoders = (name for name in TEXT_ENCODERS if self.index.get(name, [None])[0] is not None)
        check_parts(self.source.loras, (self.network.part, *encoders))

    def _fetch_configurations(self) -> Path:
        known = KNOWN_MODELS[self.folder.name]
        assert known.repository is not None
        assert known.revision is not None
        try:
            return fetch_pipeline(known.repository, known.revision, weights=False)
        except InputError as e:
            raise InputError(
                f"{self.single_file} holds no tokenizer, and {known.repository} did not supply it: "
                f"{e}; or convert the file to a diffusers folder"
            ) from e

    @property
    def _asked(self) -> Conditions:
        if self._conditions is None:
            self._conditions = self._make_conditions()
        return self._conditions

    def _make_conditions(self) -> Conditions:
        if (labels := self.network.labels(self.config)) is not None:
            return labels
        if self.family == UNCONDITIONAL:
            return NoConditions()
        if self.family == CLASS_CONDITIONAL:
            width = states_width(self.config)
            if self.source.random_weights:
                table = torch.randn(
                    IMAGENET_CLASSES + 1,
                    width,
                    generator=torch.Generator().manual_seed(self.source.seed),
                )
            else:
                table = _class_table(self.folder / CLASS_EMBEDDING, width)
            return ClassTokens(table.unflatten(1, (-1, width)))
        if self.source.random_weights:
            asked = random_prompts(self._random_states, self.source.seed)
        else:
            asked = Prompts(self.prompts, self._encode)
        if not self.channels.image:
            return asked
        if self.source.random_weights and self._given_images is None:
            inpaints = self.channels.image_kind == INPAINTING
            return WithImages(
                asked,
                asked.labels,
                lambda i: random_condition(i, self.sample_shape, masked=inpaints),
            )
        given = self._image_inputs()
        encode = self._image_encoder()
        return WithImages(asked, len(given), lambda i: encode(given[i], i))

    def image_input(self, number: int) -> ImageInput:
        """The image with this number, where the user gave none."""
        return made_image(number, *self.image_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        height, width = (side * self._pixels_per_latent() for side in self.sample_shape[1:])
        return height, width

    def image_scale(self, scaling_factor: float) -> float:
        """What an image's latents are multiplied by for the UNet, of the ``scaling_factor`` of
        what encodes it.
        """
        scaled = self.channels.image_kind == INPAINTING or self.index.get("is_cosxl_edit")
        return float(scaling_factor) if scaled else 1.0

    def _image_inputs(self) -> list[ImageInput]:
        if self._given_images is None:
            return [self.image_input(i) for i in range(len(self.prompts))]
        inpaints = self.channels.image_kind == INPAINTING
        return read_images(self._given_images, self.image_size, masked=inpaints)

    def _image_encoder(self) -> Callable[[ImageInput, int], torch.Tensor]:
        """From an image and a seed to the UNet's further channels [C, H, W], by the pipeline's own
        code.
        """
        parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *IMAGE_PARTS)
        unused: dict[str, Any] = {name: None for name in parts if name in self.index}
        pipeline = self.load_pipeline(**unused)
        height, width = self.image_size
        device = torch.device("cpu")

        def encode(given: ImageInput, seed: int) -> torch.Tensor:
            with torch.no_grad(), quiet():
                image = pipeline.image_processor.preprocess(given.image, height, width)
                if self.channels.image_kind == EDITING:
                    found: torch.Tensor = pipeline.prepare_image_latents(
                        image, 1, 1, torch.float32, device, False
                    )
                    return found[0]
                mask = pipeline.mask_processor.preprocess(given.mask, height, width)
                both = pipeline.prepare_mask_latents(
                    mask,
                    image * (mask < 0.5),
                    1,
                    height,
                    width,
                    torch.float32,
                    device,
                    torch.Generator().manual_seed(seed),
                    False,
                )
            return torch.cat(both, 1)[0]

        return encode

    def _random_states(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        height, width = self.sample_shape[1:]
        states = self.network.random_states(self.config, count, generator)
        # Eight pixels to a latent, where there is no decoder that says how many.
        return states | self.network.of_size(self.config, (8 * height, 8 * width), count)

    def _encode(
        self, prompts: list[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        pipeline = self._load_encoders()
        with torch.no_grad(), quiet():
            if not self._told_cut:
                tell_cut(pipeline, self.prompts)
                self._told_cut = True
            blocks = [
                self.network.encode(pipeline, prompts[i : i + BLOCK])
                for i in range(0, len(prompts), BLOCK)
            ]
        of_size = self.network.of_size(self.config, self.image_size, len(prompts))
        asked, unasked = (
            {name: torch.cat([part[name] for part in half]) for name in half[0]} | of_size
            for half in zip(*blocks, strict=True)
        )
        return asked, unasked

    def _pixels_per_latent(self) -> int:
        if self._decoder_config is None:
            return 8
        if not (levels := self._decoder_levels()):
            raise InputError(f"{self.name}: block_out_channels of its decoder is missing")
        return int(2 ** (levels - 1))

    def _decoder_levels(self) -> int:
        """How many resolutions the decoder has; 0 where its configuration does not say it."""
        config = self._decoder_config or {}
        channels = config.get("block_out_channels") or config.get("decoder_block_out_channels")
        return len(channels or ())

    def _decoder_side(self) -> int | None:
        """The side of the latents that the decoder is meant for, where a file says it."""
        side, levels = (self._decoder_config or {}).get("sample_size"), self._decoder_levels()
        return side // 2 ** (levels - 1) if isinstance(side, int) and levels else None

    def load_decoder(self) -> Any:
        """The diffusers module that decodes latents; None where the model works on pixels."""
        name = self._decoder
        if name is None:
            return None
        with self._loading("the decoder"):
            decoder_class = getattr(diffusers, self.index[name][1])
            if self.single_file is not None:
                config = self._fetch_configurations()
                decoder = load_single_file(self.single_file, decoder_class, config, name)
            else:
                decoder = load_part(self.folder / name, decoder_class)
        return decoder.eval()

    def check_decoder(self) -> None:
        """Raise InputError where a folder's decoder cannot be loaded: what it takes hours to need
        is found at once.
        """
        if not self.source.random_weights and self.single_file is None:
            self.load_decoder()

    def scheduler_config(self) -> dict[str, Any]:
        """See :class:`quest_deploy.models.registry.DiffusionModel`."""
        return dict(self._schedule)

    def schedule_of_size(self, height: int, width: int) -> dict[str, Any]:
        """The configuration of :meth:`scheduler_config` for images of this size, in pixels, on
        which a shift may depend; raise InputError where the network does not take it.
        """
        factor = self._pixels_per_latent()
        each = factor * self.network.sample_multiple(self.config)
        if height % each or width % each:
            raise InputError(
                f"--height {height}, --width {width}: expected multiples of {each} for {self.name}"
            )
        return self._read_schedule(
            self.network.schedule_tokens((height // factor, width // factor))
        )

    def _read_schedule(self, tokens: int | None) -> dict[str, Any]:
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = read_configuration(SchedulerConfiguration, path)
        config |= {} if self._file is None else self._file.schedule
        if not self.network.takes_variance:
            config.pop("variance_type", None)
        if self.source.prediction_type is not None:
            config["prediction_type"] = self.source.prediction_type
        parse_configuration(SchedulerConfiguration, config, str(self.single_file or path))
        _, name = self.index.get("scheduler", (None, None))
        flow = self.network.flow_matching
        if config.get("use_flow_sigmas") if flow is None else flow:
            if self.source.prediction_type is not None:
                raise InputError(
                    f"--prediction-type: not for {self.name}, a model of flow matching"
                )
            return flow_schedule(config, name, str(path), tokens)
        return noise_schedule(config, name, str(path), latent=self._decoder is not None)

    def _usual_steps(self) -> int:
        """How many steps it is used with, unless told otherwise: by default its pipeline's."""
        if (known := self.network.usual_steps(self.config, self._schedule)) is not None:
            return known
        parameters = inspect.signature(self.pipeline_class().__call__).parameters
        return int(parameters["num_inference_steps"].default)

    @property
    def _decoder(self) -> str | None:
        """What the pipeline calls its decoder; None of a model that works on pixels."""
        return next((x for x in DECODERS if self.index.get(x, [None])[0] is not None), None)

    def _read_network(self) -> tuple[Network, dict[str, Any]]:
        """The kind of the pipeline's network, and its configuration."""
        has_unet = self.index.get("unet", [None])[0] is not None
        if not has_unet and self.index.get("transformer", [None])[0] is not None:
            path = self.folder / "transformer" / "config.json"
            config = read_configuration(Configuration, path)
            name = transformer_class(
                self.name, {"_class_name": self.index["transformer"][1], **config}
            )
            network = network_of(name)
            config["_class_name"] = name
            parse_configuration(network.configuration, config, str(path))
            return network, config
        path = self.folder / "unet" / "config.json"
        if not path.exists():
            drawn_class(self.name, self.index, UNET.part)  # such as one of no UNet says so
        return UNET, read_configuration(UNET.configuration, path)

    def _apply(self, file: SingleFile) -> None:
        """Let the single file's own size and channels go before its architecture's."""
        if file.sample_size is not None:
            self.config["sample_size"] = file.sample_size
        channels = self.config["in_channels"]
        if file.in_channels not in (None, channels):
            raise InputError(
                f"{self.single_file}: its UNet has {file.in_channels} input channels, and "
                f"{self.folder.name} has {channels}; give a diffusers folder"
            )

    def _asked_for(self) -> Literal["prompt", "label"] | None:
        if self.family == TEXT_TO_IMAGE:
            return "prompt"
        has_labels = self.network.labels(self.config) is not None
        return "label" if has_labels or self.family == CLASS_CONDITIONAL else None

    def require_weights(self, purpose: str) -> None:
        """Raise InputError where the model has random weights, which are of no use to
        ``purpose``.
        """
        if self.source.random_weights:
            raise InputError(
                f"{self.name} has random weights and neither text encoder nor decoder: there is "
                f"nothing to {purpose}"
            )

    @contextmanager
    def _loading(self, part: str) -> Iterator[None]:
        """Turn what diffusers and transformers raise for files that are missing, damaged or of
        another kind into InputError.
        """
        where = self.single_file or self.folder
        try:
            with quiet():
                yield
        except InputError:
            raise
        except Exception as e:
            reason = str(e).strip().splitlines()
            raise InputError(
                f"{where}: {part} cannot be loaded ({type(e).__name__}: "
                f"{reason[0] if reason else ''})"
            ) from e


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of floating-point numbers meanwhile that are of ``dtype`` unless told."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _folder_of(source: ModelSource, file: SingleFile | None) -> Path:
    if file is not None:
        return ARCHITECTURES / file.architecture
    if source.path is not None:
        return source.path
    if source.location is None:
        known = KNOWN_MODELS.get(source.name)
        return (
            ARCHITECTURES / source.name if known is None or known.folder is None else known.folder
        )
    assert source.revision is not None
    return fetch_pipeline(source.location, source.revision)


def _class_table(path: Path, width: int) -> torch.Tensor:
    try:
        table: torch.Tensor = read_tensors(path, "pt")["weight"].float()
    except (OSError, SafetensorError, KeyError) as e:
        raise InputError(
            f"{path}: a class-conditional model needs this file, with the classes' tokens as "
            f'"weight" ({e})'
        ) from e
    if table.dim() != 2 or len(table) < 2 or table.shape[1] % width:
        raise InputError(
            f"{path}: expected [classes + 1, tokens x {width}], found {list(table.shape)}"
        )
    return table


def unscaled(decoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """The sampler's latents [B, C, h, w] as ``decoder`` takes them: with its own mean and deviation
    where its configuration has them, as diffusers' pipelines do.
    """
    config = decoder.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    factor, shift = torch.ones(1), torch.full((1,), getattr(config, "shift_factor", None) or 0.0)
    if mean is not None and deviation is not None:
        shift, factor = (torch.tensor(x).view(1, -1, 1, 1) for x in (mean, deviation))
    samples: torch.Tensor = latents * factor / config.scaling_factor + shift
    return samples


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notices that diffusers and transformers print while they
    load.
    """
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        for logging in (diffusers_logging, transformers_logging):
            logging.enable_progress_bar()
