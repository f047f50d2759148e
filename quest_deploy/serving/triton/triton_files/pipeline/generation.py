"""What `pipeline` and `pipeline_stream` do with one request, free of Triton: check it, denoise,
decode.

The models it needs (text encoder, denoising network, decoder) are behind one asynchronous function.
Needs numpy, torch, diffusers, Pillow, and for a text-to-image model tokenizers; runs on Python 3.10
or newer.
"""

from __future__ import annotations

import inspect
import io
import json
import secrets
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Arrays = dict[str, np.ndarray]
    Infer = Callable[[str, Arrays], Awaitable[Arrays]]
    """Runs a model by its name: from inputs to outputs, each [B, ...]."""

SETTINGS, CONDITIONS = "settings.json", "conditions.npz"
SUFFIXES = ("", "_2", "_3")
"""Of the tokenizers, and of what each gives the text encoder."""
MAX_PROMPT_BYTES = 16384
"""Longer prompts are refused before they are read."""
MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS = 2**25, 2**24
"""Larger files are refused before they are decoded."""
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
INPAINTING, EDITING = "inpainting", "instruct-pix2pix"
LEARNED_VARIANCE = ("learned", "learned_range")
MAX_GUIDANCE = 1000.0
"""Far beyond any weight that makes an image; larger ones overflow."""
MAX_CONTROL_SCALE = 10.0
"""Far beyond any scale that a ControlNet or an IP-Adapter is used with."""
PROMPT_TOKENS, PROMPT_SCALE = "ip_adapter_tokens", "ip_adapter_scale"
"""The UNet's inputs of an IP-Adapter."""
GUIDANCE = "guidance"
"""The network's input for the weight, where it embeds one."""
EULER_OF_FLOW = "FlowMatchEulerDiscreteScheduler"
SIZES: dict[str, Callable[[int, int], list[float]]] = {
    "time_ids": lambda height, width: [height, width, 0, 0, height, width],
    "resolution": lambda height, width: [height, width],
    "aspect_ratio": lambda height, width: [height / width],
}
"""What a network is told of an image's height and width, by the name of its input."""
DTYPES = {
    "prompt": np.object_,
    "negative_prompt": np.object_,
    "scheduler": np.object_,
    "label": np.int32,
    "steps": np.int32,
    "height": np.int32,
    "width": np.int32,
    "seed": np.int64,
    "guidance": np.float32,
    "init_image": np.object_,
    "mask_image": np.object_,
    "image_guidance": np.float32,
    "control_image": np.object_,
    "control_scale": np.float32,
    "ip_adapter_image": np.object_,
    "ip_adapter_scale": np.float32,
}


class InvalidRequestError(ValueError):
    """The request cannot be served as it is; the message says what was expected."""


class NotFiniteError(ArithmeticError):
    """A model gave infinities or NaNs, which make no image."""


@dataclass(frozen=True)
class Limits:
    """What a configuration allows; its parameters by these names.

    Attributes:
        max_steps: denoising steps of a request.
        max_size: pixels of the height and of the width.
        max_in_flight: images drawn at the same time, in each process of the pipeline.
        model_timeout: seconds to wait for one answer of another model.
    """

    max_steps: int
    max_size: int
    max_in_flight: int = 1
    model_timeout: int = 600

    @classmethod
    def of(cls, parameters: dict[str, dict[str, str]]) -> Limits:
        """From the ``parameters`` of a model's configuration; raise ValueError where one is missing
        or no whole number of 1 or more.
        """
        found = {}
        for field in fields(cls):
            text = parameters.get(field.name, {}).get("string_value", "")
            if not (text.isascii() and text.isdigit() and int(text)):
                raise ValueError(
                    f"parameter {field.name} in config.pbtxt: expected a whole number of 1 or "
                    f"more, found {text!r}"
                )
            found[field.name] = int(text)
        return cls(**found)


@dataclass(frozen=True)
class Job:
    """One image to draw.

    Attributes:
        label: the class, of a class-conditional model.
        tokens, negative_tokens: what the text encoder reads, by the name of its input.
        no_negative: whether no negative prompt was given.
        height, width: of the image, in pixels.
        guided: whether the guidance is classifier-free.
        image_guidance: the weight of the image that is edited, None where none is.
        image: float32 [1, 3, H, W] in [-1, 1], what is inpainted or edited, if anything.
        mask: float32 [1, 1, H, W], 1 where it is drawn anew and 0 elsewhere.
        control: float32 [1, 3, H, W] in [0, 1], what the ControlNet is shown, if anything.
        control_scale: of what it adds.
        shown: float32 [1, 3, H, W], what the IP-Adapter's image encoder reads, if anything.
        shown_scale: of what the IP-Adapter adds.
    """

    label: int
    tokens: dict[str, list[int]]
    negative_tokens: dict[str, list[int]]
    no_negative: bool
    seed: int
    steps: int
    scheduler: str
    guidance: float
    height: int
    width: int
    guided: bool = True
    image_guidance: float | None = None
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    control: torch.Tensor | None = None
    control_scale: float = 1.0
    shown: torch.Tensor | None = None
    shown_scale: float = 0.0

    @property
    def rows(self) -> int:
        """How many rows of the network's batch it takes: with a classifier-free guidance above 1
        two, where an image is edited three.
        """
        if self.guidance <= 1 or not self.guided:
            return 1
        return 2 if self.image_guidance is None else 3


class Generator:
    """Draws images of one model.

    Args:
        folder: where ``settings.json`` and what belongs to it lie.
        limits: what requests may ask for.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.limits = limits
        self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
        tables = folder / CONDITIONS
        self._tables: Arrays = dict(np.load(tables, allow_pickle=False)) if tables.exists() else {}
        self._tokenizers = [
            _tokenizer(folder / f"tokenizer{suffix}")
            for suffix, _ in zip(SUFFIXES, self.settings["tokens"], strict=False)
        ]
        self._channels = self.settings["sample_shape"][0]
        self._prompt: dict[str, Any] = self.settings.get("image_prompt", {})

    def jobs(self, inputs: Arrays) -> list[Job]:
        """The images that a request asks for, one a row.

        Args:
            inputs: each [B, 1], by name; what may be left out has a default.

        Raises:
            InvalidRequestError: anything that the model or the limits do not allow.
        """
        rows = _rows(inputs)
        jobs = []
        for i in range(rows):
            given = {name: value[i, 0] for name, value in inputs.items()}
            try:
                jobs.append(self._job(given))
            except InvalidRequestError as e:
                raise InvalidRequestError(
                    f"image {i + 1} of {rows}: {e}" if rows > 1 else str(e)
                ) from e
        return jobs

    async def draw(self, job: Job, infer: Infer, on_step: Callable[[int, int], None]) -> np.ndarray:
        """The image as uint8 [H, W, C].

        Args:
            infer: runs a model.
            on_step: is told after each step how many of how many are done; what it raises ends the
                work.

        Raises:
            NotFiniteError: a model gave infinities or NaNs.
        """
        conditions = await self._conditions(job, infer)
        scheduler = self._scheduler(job.scheduler, job.steps, job.height, job.width)
        generator = torch.Generator().manual_seed(job.seed)
        factor = self.settings["pixels_per_latent"]
        shape = (1, self._channels, job.height // factor, job.width // factor)
        # Flow matching's own scheduler scales neither noise nor inputs.
        latents = torch.randn(shape, generator=generator) * getattr(
            scheduler, "init_noise_sigma", 1.0
        )
        # Schedulers that add noise take it from the seed too.
        extra = (
            {"generator": generator}
            if "generator" in inspect.signature(scheduler.step).parameters
            else {}
        )
        behind = await self._image_condition(job, generator, infer)
        added = self._nothing_added(job.rows, *shape[2:])
        for i, timestep in enumerate(scheduler.timesteps):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            scaled = scaled.repeat(job.rows, 1, 1, 1)
            inputs = {
                "sample": scaled.numpy(),
                "timestep": np.full((job.rows, 1), float(timestep), np.float32),
                **conditions,
            }
            if job.control is not None:
                added = await self._residuals(job.control, job, inputs, infer)
            inputs |= added
            inputs["sample"] = torch.cat([scaled, *behind], 1).numpy()
            found = await infer(self.settings["network"], inputs)
            answer = torch.from_numpy(next(iter(found.values())))
            prediction = guided(answer, job, self._channels)
            if not self._uses_variance(job.scheduler):
                prediction = prediction[:, : self._channels]
            latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
            if not torch.isfinite(latents).all():
                raise NotFiniteError(
                    f"the latents are no longer finite after step {i + 1} of "
                    f"{len(scheduler.timesteps)}"
                )
            on_step(i + 1, len(scheduler.timesteps))
        image = await self._decode(latents.float().numpy(), infer)
        if not np.isfinite(image).all():
            raise NotFiniteError("the decoder's image is not finite")
        return pixels(image)

    def _job(self, given: dict[str, Any]) -> Job:
        settings, defaults = self.settings, self.settings["defaults"]
        steps = int(given.get("steps", defaults["steps"]))
        if not 1 <= steps <= self.limits.max_steps:
            raise InvalidRequestError(
                f"steps: expected 1 to {self.limits.max_steps}, found {steps}"
            )
        scheduler = _text("scheduler", given.get("scheduler", defaults["scheduler"]))
        if scheduler not in settings["schedulers"]:
            raise InvalidRequestError(
                f"scheduler: expected one of {', '.join(settings['schedulers'])}, found "
                f"{scheduler[:100]!r}"
            )
        height, width = self._size(given)
        self._scheduler(scheduler, steps, height, width)
        guidance = float(given.get("guidance", defaults["guidance"]))
        if not 0 <= guidance <= MAX_GUIDANCE:  # nor NaN
            raise InvalidRequestError(
                f"guidance: expected a weight from 0 to {MAX_GUIDANCE:g}, found {guidance:g}"
            )
        guided, embedded = settings["guidable"], settings["embeds_guidance"]
        if guidance > 1 and not guided and not embedded:
            raise InvalidRequestError(
                "guidance: the model has no unconditional condition, so expected 1 or less, found "
                f"{guidance:g}"
            )
        if "negative_prompt" in given and not guided:
            raise InvalidRequestError(
                "negative_prompt: expected none, the model has no classifier-free guidance"
            )
        seed = int(given.get("seed", secrets.randbits(32)))
        if seed < 0:
            raise InvalidRequestError(f"seed: expected 0 or more, found {seed}")
        if self._tokenizers and "prompt" not in given:
            raise InvalidRequestError("prompt: expected one")
        image_guidance = self._image_guidance(given)
        image, mask = self._images(given, height, width)
        return Job(
            label=self._label(given),
            tokens=self._tokens("prompt", given.get("prompt", b""), asked=True),
            negative_tokens=self._tokens(
                "negative_prompt", given.get("negative_prompt", b""), asked=False
            ),
            no_negative="negative_prompt" not in given,
            seed=seed,
            steps=steps,
            scheduler=scheduler,
            guidance=guidance,
            height=height,
            width=width,
            guided=guided,
            image_guidance=image_guidance,
            image=image,
            mask=mask,
            control=self._control(given, height, width),
            control_scale=_scale("control_scale", given, 1.0),
            shown=self._shown(given),
            shown_scale=_scale(PROMPT_SCALE, given, self._prompt.get("scale", 0.0)),
        )

    def _control(self, given: dict[str, Any], height: int, width: int) -> torch.Tensor | None:
        """What the ControlNet is shown, as :class:`Job` has it."""
        for name in ("control_image", "control_scale"):
            if name in given and not self.settings["residuals"]:
                raise InvalidRequestError(f"{name}: expected none, this package has no ControlNet")
        if "control_image" not in given:
            if "control_scale" in given:
                raise InvalidRequestError("control_scale: expected a control_image beside it")
            return None
        image = _image("control_image", given["control_image"])
        return _array(resized(image, height, width))

    def _shown(self, given: dict[str, Any]) -> torch.Tensor | None:
        """What the IP-Adapter's image encoder reads, as :class:`Job` has it."""
        for name in ("ip_adapter_image", PROMPT_SCALE):
            if name in given and not self._prompt:
                raise InvalidRequestError(f"{name}: expected none, this package has no IP-Adapter")
        if "ip_adapter_image" not in given:
            if PROMPT_SCALE in given:
                raise InvalidRequestError(f"{PROMPT_SCALE}: expected an ip_adapter_image beside it")
            return None
        return clip_pixels(_image("ip_adapter_image", given["ip_adapter_image"]), self._prompt)

    def _image_guidance(self, given: dict[str, Any]) -> float | None:
        if self.settings["image"] != EDITING:
            return None
        weight = float(given.get("image_guidance", self.settings["defaults"]["image_guidance"]))
        if not 1 <= weight <= MAX_GUIDANCE:  # nor NaN
            raise InvalidRequestError(
                f"image_guidance: expected a weight from 1 to {MAX_GUIDANCE:g}, found {weight:g}"
            )
        return weight

    def _images(
        self, given: dict[str, Any], height: int, width: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The image and the mask of a request, as :class:`Job` has them."""
        kind = self.settings["image"]
        names = {INPAINTING: ("init_image", "mask_image"), EDITING: ("init_image",)}.get(kind, ())
        for name in ("init_image", "mask_image"):
            if (name in given) != (name in names):
                raise InvalidRequestError(
                    f"{name}: expected {'one' if name in names else 'none of this model'}"
                )
        found = [resized(_image(name, given[name]), height, width) for name in names]
        image = found[0] if found else None
        # A mask's shades are rounded to black and white, as diffusers does.
        mask = found[1].convert("L") if len(found) > 1 else None
        return (
            None if image is None else _array(image) * 2 - 1,
            None if mask is None else (_array(mask) >= 0.5).float(),
        )

    def _label(self, given: dict[str, Any]) -> int:
        labels = self.settings["labels"]
        if labels == 1:
            return 0
        if "label" not in given:
            raise InvalidRequestError(f"label: expected one, from 0 to {labels - 1}")
        label = int(given["label"])
        if not 0 <= label < labels:
            raise InvalidRequestError(f"label: expected 0 to {labels - 1}, found {label}")
        return label

    def _size(self, given: dict[str, Any]) -> tuple[int, int]:
        """Height and width, in pixels."""
        factor, sizes = self.settings["size_factor"], self.settings["sizes"]
        largest = min(self.limits.max_size, self.settings["largest"] or self.limits.max_size)
        height, width = (
            int(given.get(name, default))
            for name, default in zip(("height", "width"), self.settings["size"], strict=True)
        )
        for name, side in (("height", height), ("width", width)):
            if not 1 <= side <= largest or side % factor:
                raise InvalidRequestError(
                    f"{name}: expected a multiple of {factor} up to {largest}, found {side}"
                )
        if sizes and [height, width] not in sizes:
            known = ", ".join(f"{high}x{wide}" for high, wide in sizes)
            raise InvalidRequestError(
                f"height, width: the plan was built for {known}; found {height}x{width}"
            )
        return height, width

    def _tokens(self, name: str, given: bytes | str, *, asked: bool) -> dict[str, list[int]]:
        """What the text encoder reads of a prompt that is ``asked`` for, or of a negative one, by
        the names of its inputs.
        """
        text = _text(name, given)
        found = {}
        tokenizers = zip(SUFFIXES, self._tokenizers, self.settings["tokens"], strict=False)
        for suffix, (tokenizer, pad), rule in tokenizers:
            before, length, kept = rule["before"] if asked else "", rule["length"], rule["kept"]
            most = length if asked or kept is None else kept
            ids = tokenizer.encode(before + (text.lower().strip() if rule["lower"] else text)).ids
            if rule["cut"] and len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]
            if len(ids) > most:
                marks = tokenizer.num_special_tokens_to_add(is_pair=False)
                raise InvalidRequestError(
                    f"{name}: expected at most {most} tokens, {marks} of them marks of the start "
                    f"or the end; found {len(ids)}"
                )
            rest = length - len(ids)
            found[f"input_ids{suffix}"] = ids + [pad] * rest
            if rule["masked"]:
                found[f"attention_mask{suffix}"] = [1] * len(ids) + [0] * rest
            if kept is not None:
                last = range(length - kept + 1, length)
                found[f"places{suffix}"] = [0, *last] if asked else [*range(kept)]
        return found

    def _scheduler(self, name: str, steps: int, height: int, width: int) -> Any:
        """A new scheduler, its timesteps set for an image of this size."""
        made = self.settings["schedulers"][name]
        scheduler = getattr(diffusers, made["class"]).from_config(made["config"])
        trained = scheduler.config.num_train_timesteps
        if steps > trained:
            raise InvalidRequestError(f"steps: expected at most {trained}, found {steps}")
        euler_of_flow = made["class"] == EULER_OF_FLOW
        told: dict[str, Any] = {}
        if (tokens := self.settings["tokens_per_latent"]) is not None:
            if euler_of_flow:
                told["sigmas"] = np.linspace(1.0, 1 / steps, steps)
            if scheduler.config.use_dynamic_shifting:
                area = height * width / self.settings["pixels_per_latent"] ** 2
                told["mu"] = _shift(scheduler.config, area * tokens)
        try:
            scheduler.set_timesteps(steps, **told)
        except Exception as e:  # LCM's has a limit of its own, PNDM's needs four
            raise InvalidRequestError(f"steps: {name} does not take {steps}: {e}") from e
        # Flow matching begins at the last timestep itself, pure noise.
        if (highest := float(scheduler.timesteps.max())) >= trained + euler_of_flow:
            raise InvalidRequestError(
                f"steps: {steps} steps begin at timestep {highest:g}, and the model knows those "
                f"below {trained}; take fewer"
            )
        if made["config"].get("use_flow_sigmas"):
            # It would look for the first timestep by its value, which a shift may give the second.
            scheduler.set_begin_index(0)
        return scheduler

    def _uses_variance(self, scheduler: str) -> bool:
        """Whether a scheduler takes the variance that the UNet predicts: DDPM's alone does."""
        made = self.settings["schedulers"][scheduler]
        learned = made["config"].get("variance_type") in LEARNED_VARIANCE
        return learned and made["class"] == "DDPMScheduler"

    async def _image_condition(
        self, job: Job, generator: torch.Generator, infer: Infer
    ) -> list[torch.Tensor]:
        """What the UNet's sample holds behind the latents: [rows, C, h, w], or nothing."""
        if job.image is None:
            return []
        image = job.image if job.mask is None else job.image * (job.mask < 0.5)
        found = await infer("vae_encoder", {"sample": image.numpy()})
        mean, deviation = (torch.from_numpy(found[name]) for name in ("mean", "deviation"))
        if job.mask is None:
            rows = [mean, mean, torch.zeros_like(mean)] if job.rows == 3 else [mean]
            return [torch.cat(rows)]
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        mask = torch.nn.functional.interpolate(job.mask, size=mean.shape[2:])
        return [torch.cat([mask, latents], 1).repeat(job.rows, 1, 1, 1)]

    def _nothing_added(self, rows: int, height: int, width: int) -> Arrays:
        """Zeros for what a ControlNet adds to the UNet, [rows, ...], by the name of its input."""
        return {
            name: np.zeros((rows, channels, height // divisor, width // divisor), np.float32)
            for name, (channels, divisor) in self.settings["residuals"].items()
        }

    async def _residuals(
        self, control: torch.Tensor, job: Job, inputs: Arrays, infer: Infer
    ) -> Arrays:
        """What the ControlNet adds to the UNet where it is shown ``control``, as
        :meth:`_nothing_added`.

        Args:
            inputs: the UNet's own, its sample without an image's channels.
        """
        # Its pixels lie among the channels: the image has the latents' height and width.
        factor = self.settings["pixels_per_latent"]
        shown = torch.nn.functional.pixel_unshuffle(control, factor)
        image = shown.expand(job.rows, -1, -1, -1).numpy()
        taken = self.settings["models"]["controlnet"]["inputs"]
        own = {name: value for name, value in inputs.items() if name in taken}
        added = await infer("controlnet", {**own, "image": image})
        return {name: value * np.float32(job.control_scale) for name, value in added.items()}

    async def _conditions(self, job: Job, infer: Infer) -> Arrays:
        """The network's further inputs, [rows, ...], in the order of :func:`guided`."""
        asked = {1: [True], 2: [False, True], 3: [True, False, False]}[job.rows]
        if not self._tokenizers:
            rows = [job.label if each else -1 for each in asked]
            # Triton wants a dimension behind the batch.
            return {
                name: table[rows].reshape(len(rows), -1, *table.shape[2:])
                for name, table in self._tables.items()
            }
        halves = [job.tokens if each else job.negative_tokens for each in asked]
        ids = {name: np.asarray([half[name] for half in halves], np.int32) for name in job.tokens}
        states = await infer("text_encoder", ids)
        if job.no_negative and self.settings["zero_unconditional"]:
            states = {
                name: value * np.asarray(asked, value.dtype).reshape(-1, *[1] * (value.ndim - 1))
                for name, value in states.items()
            }
        for name in self.settings["of_size"]:
            told = SIZES[name](job.height, job.width)
            states[name] = np.asarray([told] * job.rows, np.float32)
        if self.settings["embeds_guidance"]:
            states[GUIDANCE] = np.full((job.rows, 1), job.guidance, np.float32)
        return states | await self._image_prompt(job, asked, infer)

    async def _image_prompt(self, job: Job, asked: list[bool], infer: Infer) -> Arrays:
        """The IP-Adapter's inputs of the UNet, if it has one: an image's tokens and those of no
        image in the rows that are not ``asked`` for; zeros without an image.
        """
        if not self._prompt:
            return {}
        null = self._tables[PROMPT_TOKENS]
        if job.shown is None:
            tokens, scale = np.zeros((len(asked), *null.shape[1:]), np.float32), 0.0
        else:
            found = await infer("image_encoder", {"pixels": job.shown.numpy()})
            rows = [found[PROMPT_TOKENS] if each else null for each in asked]
            tokens, scale = np.concatenate(rows).astype(np.float32), job.shown_scale
        scales = np.full((len(asked), 1), scale, np.float32)
        return {PROMPT_TOKENS: tokens, PROMPT_SCALE: scales}

    async def _decode(self, latents: np.ndarray, infer: Infer) -> np.ndarray:
        """Latents [1, C, h, w] to an image [1, C, H, W] in [-1, 1], or a little beyond."""
        if self.settings["decoder"]:
            decoded: np.ndarray = (await infer("vae_decoder", {"sample": latents}))["image"]
            return decoded
        if (factor := self.settings["pixels_per_latent"]) == 1:
            return latents
        shuffled: np.ndarray = torch.nn.functional.pixel_shuffle(
            torch.from_numpy(latents), factor
        ).numpy()
        return shuffled


def guided(answer: torch.Tensor, job: Job, channels: int) -> torch.Tensor:
    """One prediction [1, ...] of the UNet's answer [rows, ...]: unconditional and asked for; of an
    edited image asked for, without text, without text and image. What lies behind the ``channels``
    is a variance, that of what is asked for.
    """
    if job.rows == 1:
        return answer
    means = answer[:, :channels].chunk(job.rows)
    if job.image_guidance is None:
        mean = means[0] + job.guidance * (means[1] - means[0])
    else:
        text, image, nothing = means
        mean = nothing + job.guidance * (text - image) + job.image_guidance * (image - nothing)
    asked = answer[-1:] if job.image_guidance is None else answer[:1]
    return torch.cat([mean, asked[:, channels:]], 1)


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """``image`` of another size, as diffusers' pipelines resize it."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def pixels(image: np.ndarray) -> np.ndarray:
    """An image [1, C, H, W] in [-1, 1] as uint8 [H, W, C]."""
    levels: np.ndarray = (
        ((image[0].transpose(1, 2, 0).clip(-1, 1) / 2 + 0.5) * 255).round().astype(np.uint8)
    )
    return levels


def png(image: np.ndarray) -> bytes:
    """An image, uint8 [H, W, C] with one channel or three, as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(stream, format="PNG")
    return stream.getvalue()


def clip_pixels(image: Image.Image, settings: dict[str, Any]) -> torch.Tensor:
    """What CLIP reads of an RGB image, float32 [1, 3, H, W], as transformers' image processor of
    these ``settings`` has it: the shorter side resized, the middle cropped, normalized. Raise
    InvalidRequestError for an image so long that it is large when it is resized.
    """
    size, (height, width) = settings["size"], settings["crop"]
    short = min(image.size)
    wide, high = (size if x == short else int(size * x / short) for x in image.size)
    if wide * high > MAX_IMAGE_PIXELS:  # which a file of a few hundred bytes can be
        raise InvalidRequestError(
            f"ip_adapter_image: expected at most {MAX_IMAGE_PIXELS} pixels where its shorter side "
            f"has {size}, found {wide}x{high}; crop it"
        )
    scaled = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    cropped = _array(scaled.crop((left, top, left + width, top + height)))
    mean, deviation = (
        torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("mean", "deviation")
    )
    return (cropped - mean) / deviation


def _scale(name: str, given: dict[str, Any], default: float) -> float:
    scale = float(given.get(name, default))
    if not 0 <= scale <= MAX_CONTROL_SCALE:  # nor NaN
        raise InvalidRequestError(
            f"{name}: expected a scale from 0 to {MAX_CONTROL_SCALE:g}, found {scale:g}"
        )
    return scale


def _rows(inputs: Arrays) -> int:
    """How many images are asked for; raise InvalidRequestError for inputs of a wrong type or shape,
    or none.
    """
    if not inputs:
        raise InvalidRequestError(f"expected inputs, of {', '.join(DTYPES)}; found none")
    for name, value in inputs.items():
        if name not in DTYPES:
            raise InvalidRequestError(f"{name}: unknown; expected inputs of {', '.join(DTYPES)}")
        if value.dtype != DTYPES[name]:
            raise InvalidRequestError(
                f"{name}: expected the type {np.dtype(DTYPES[name]).name}, found {value.dtype.name}"
            )
        if value.ndim != 2 or value.shape[1] != 1 or not len(value):
            raise InvalidRequestError(
                f"{name}: expected the shape [images, 1], found {list(value.shape)}"
            )
    counts = {name: len(value) for name, value in inputs.items()}
    if len(set(counts.values())) > 1:
        raise InvalidRequestError(f"expected as many rows in each input, found {counts}")
    return next(iter(counts.values()))


def _text(name: str, given: bytes | str) -> str:
    data = given.encode(errors="surrogatepass") if isinstance(given, str) else given
    if len(data) > MAX_PROMPT_BYTES:
        raise InvalidRequestError(
            f"{name}: expected at most {MAX_PROMPT_BYTES} bytes, found {len(data)}"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise InvalidRequestError(f"{name}: expected UTF-8 ({e})") from e


def _image(name: str, data: bytes | str) -> Image.Image:
    """The image of a file, in RGB."""
    if not isinstance(data, bytes) or len(data) > MAX_IMAGE_BYTES:
        raise InvalidRequestError(f"{name}: expected a file of at most {MAX_IMAGE_BYTES} bytes")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise InvalidRequestError(
                    f"{name}: expected at most {MAX_IMAGE_PIXELS} pixels, found "
                    f"{image.width}x{image.height}"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except InvalidRequestError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InvalidRequestError(
            f"{name}: expected a file of {', '.join(IMAGE_FORMATS)} ({e})"
        ) from e


def _array(image: Image.Image) -> torch.Tensor:
    """An image's pixels, float32 [1, C, H, W] in [0, 1]."""
    levels = np.asarray(image, np.float32)
    levels = levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)
    return torch.from_numpy(levels / 255)[None]


def _shift(config: Any, tokens: float) -> float:
    """The logarithm of the shift of a schedule for so many tokens: on the line through two."""
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    return float(low + (high - low) / (most - fewest) * (tokens - fewest))


def _tokenizer(folder: Path) -> tuple[Any, int]:
    """A tokenizer, and what it pads with."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    pad = config["pad_token"]
    return tokenizer, tokenizer.token_to_id(pad if isinstance(pad, str) else pad["content"])
