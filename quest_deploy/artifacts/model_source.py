"""Where a model comes from: what the user names, what a workspace's manifest keeps of it, and
whether it is still the same.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from quest_deploy.artifacts.schema import validated
from quest_deploy.artifacts.tensors import open_tensors
from quest_deploy.errors import InputError
from quest_deploy.files import absolute, read_bounded, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

IMPORTED = "imported"
"""What a checkpoint from `quest-deploy import` calls its model, which is no model of the
registry's.
"""
IMPORTED_ALONE = (
    "this command needs a whole model (sampler, conditions, decoder), and an imported checkpoint "
    "holds the UNet alone; use export, reference, build-engine, verify or benchmark"
)
SINGLE_FILES = (".safetensors", ".ckpt")
INDEX = "model_index.json"
_LORA = ".safetensors"
IMAGE_ENCODER = "image_encoder"
"""The folder of an IP-Adapter's or a pipeline's image encoder."""
MAX_IP_ADAPTER_SCALE = 10.0
"""Far beyond any that is used; a package takes none above it."""
ADAPTER_CONFIG = "adapter_config.json"
"""What peft says of a LoRA, its alpha among it, in a file beside the weights."""
_MOST_TEXT_BYTES = 64 * 2**20
"""What is larger is no configuration, and would be refused where it is read."""
_WEIGHTS = (".safetensors", ".bin", ".ckpt")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@validated("LoRA")
@dataclass(frozen=True)
class Lora:
    """A LoRA that is fused into the model before it is quantized: a safetensors file, its weight
    and the file's hash, with that of :data:`ADAPTER_CONFIG` where it is beside it.
    """

    path: str
    weight: float
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read "PATH" or "PATH:WEIGHT"; raise InputError where there is no such safetensors file,
        or the weight is no number.
        """
        path, factor = path_and_number(text, is_path=text.endswith(_LORA))
        if factor is None:
            raise InputError(
                f"--lora {text}: expected PATH:WEIGHT with a finite weight, such as "
                "style.safetensors:0.8"
            )
        if path.suffix != _LORA:
            raise InputError(f"--lora {text}: expected a {_LORA} file, found {path.name}")
        if not path.is_file():
            raise InputError(f"--lora {text}: {path} does not exist")
        return cls(str(absolute(path)), factor, _hash_of(path))

    def check(self) -> None:
        """Raise InputError where the file is another one by now."""
        path = Path(self.path)
        if not path.is_file() or _hash_of(path) != self.sha256:
            raise InputError(
                f"the LoRA {path} was changed or removed since the workspace was made; {_REPAIR}"
            )


@validated("IP-Adapter")
@dataclass(frozen=True)
class IPAdapter:
    """An IP-Adapter whose keys and values are quantized with the model's: a safetensors file, the
    scale that the model is calibrated with, and the file's hash.

    Attributes:
        image_encoder: the folder of what encodes its images; None for the one in ``path``'s folder,
            or else the pipeline's.
        fingerprint: of the image encoder's folder, where one is given or lies beside the file.
    """

    path: str
    scale: float
    sha256: str
    image_encoder: str | None = None
    fingerprint: str | None = None

    @classmethod
    def parse(cls, text: str, image_encoder: Path | None = None) -> IPAdapter:
        """Read "FILE" or "FILE:SCALE"; raise InputError where there is no such safetensors file or
        folder, or the scale is no positive number up to ``MAX_IP_ADAPTER_SCALE``.
        """
        path, scale = path_and_number(text, is_path=text.endswith(_LORA))
        flag = f"--ip-adapter {text}"
        if scale is None or not 0 < scale <= MAX_IP_ADAPTER_SCALE:
            raise InputError(
                f"{flag}: expected FILE:SCALE with a scale above 0 and up to "
                f"{MAX_IP_ADAPTER_SCALE:g}, such as ip-adapter_sd15.safetensors:0.6"
            )
        if path.suffix != _LORA:
            raise InputError(f"{flag}: expected a {_LORA} file, found {path.name}")
        if not path.is_file():
            raise InputError(f"{flag}: {path} does not exist")
        if image_encoder is not None and not image_encoder.is_dir():
            raise InputError(f"--image-encoder {image_encoder}: expected its folder")
        folder = path.parent / IMAGE_ENCODER if image_encoder is None else image_encoder
        found = absolute(folder) if folder.is_dir() else None
        return cls(
            str(absolute(path)),
            scale,
            _hash_of(path, "IP-Adapter"),
            None if found is None else str(found),
            None if found is None else fingerprint(found),
        )

    def __str__(self) -> str:
        given = f"{self.path}:{self.scale:g}"
        return given if self.image_encoder is None else f"{given} with {self.image_encoder}"

    def check(self) -> None:
        """Raise InputError where the file or the folder is another one by now."""
        path = Path(self.path)
        if not path.is_file() or _hash_of(path, "IP-Adapter") != self.sha256:
            raise InputError(
                f"the IP-Adapter {path} was changed or removed since the workspace was made; "
                f"{_REPAIR}"
            )
        if self.image_encoder is not None:
            folder = Path(self.image_encoder)
            if not folder.is_dir() or fingerprint(folder) != self.fingerprint:
                raise InputError(
                    f"the image encoder {folder} was changed or removed since the workspace was "
                    f"made; {_REPAIR}"
                )


def _hash_of(lora: Path, kind: str = "LoRA") -> str:
    """The hash of a LoRA, or an adapter of another ``kind``, and of the settings beside it; raise
    InputError where the file is none, or has more bytes than its header says: gigabytes of zeros
    are refused before they are read.
    """
    try:
        open_tensors(lora)
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"the {kind} {lora}: expected a safetensors file of the size that its header says, "
            f"found one of {lora.stat().st_size} bytes ({e}); get it again"
        ) from e
    beside, digest = lora.with_name(ADAPTER_CONFIG), sha256_of(lora)
    if not beside.is_file():
        return digest
    settings = read_bounded(
        beside, _MOST_TEXT_BYTES, "copy it again from where peft saved the LoRA"
    )
    return hashlib.sha256(f"{digest} {hashlib.sha256(settings).hexdigest()}".encode()).hexdigest()


@validated("model's source")
@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: the registry's name, or the stem of the folder or file.
        location: the hub's repository, or the absolute path of a folder or file; None for what the
            package itself has.
        revision: of a repository, the commit.
        requested: of a repository, the branch, tag or commit that the user asked for, if any.
        random_weights: the architecture alone, its weights drawn with ``seed``.
        fingerprint: of a folder or file, see :func:`fingerprint`.
        prediction_type: what the user says that it predicts, if anything.
        ip_adapter: what its cross-attention reads beside the text, if anything.
    """

    name: str
    location: str | None = None
    revision: str | None = None
    requested: str | None = None
    random_weights: bool = False
    seed: int = 0
    loras: tuple[Lora, ...] = ()
    fingerprint: str | None = None
    prediction_type: str | None = None
    ip_adapter: IPAdapter | None = None

    @property
    def path(self) -> Path | None:
        """The local folder or file, if it is one."""
        return (
            Path(self.location)
            if self.location is not None and Path(self.location).is_absolute()
            else None
        )

    def to_json(self) -> dict[str, Any]:
        """The source as a JSON value; without an IP-Adapter as it was before there were any."""
        found = asdict(self) | {"loras": [asdict(lora) for lora in self.loras]}
        if self.ip_adapter is None:
            del found["ip_adapter"]
        return found

    def check_unchanged(self) -> None:
        """Raise InputError where the folder, the file, a LoRA or an IP-Adapter is not what it was
        when the source was recorded.
        """
        if self.path is not None and self.fingerprint is not None:
            if not self.path.exists():
                raise InputError(f"the model {self.path} is missing; {_REPAIR}")
            if fingerprint(self.path) != self.fingerprint:
                raise InputError(
                    f"the model {self.path} was changed since the workspace was made; {_REPAIR}"
                )
        for lora in self.loras:
            lora.check()
        if self.ip_adapter is not None:
            self.ip_adapter.check()


_REPAIR = "restore it, or start a new workspace with -w"


def fingerprint(path: Path) -> str:
    """A hash by which a model's folder or file is known again, in much less time than reading
    gigabytes takes.

    It covers the name, the size and 64 samples of 4 KiB of every weight file, all of every JSON
    and text file, and a single file's original configuration; links are followed. Weights that
    were trained further differ everywhere; an edit of single weights may go unseen.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(_files_in(path, digest)):
        if file.suffix in _WEIGHTS:
            content = _samples(file)
        elif file.suffix in (".json", ".txt"):
            content = _text(file)
        else:
            continue
        name = file.name if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode() + content)
    if path.is_file() and (configuration := beside(path)) is not None:
        digest.update(_text(configuration))
    return digest.hexdigest()


def beside(path: Path) -> Path | None:
    """The original configuration that lies beside a single file, a YAML file of its name."""
    found = (path.with_suffix(suffix) for suffix in (".yaml", ".yml"))
    return next((file for file in found if file.is_file()), None)


def _files_in(root: Path, digest: hashlib._Hash) -> Iterator[Path]:
    """The files in a folder and in what its links lead to, but for hidden ones; a folder that was
    met before is not entered again, and its two names go into ``digest``. Raise InputError where
    there is a pipe or a device.
    """
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder or a file, found a pipe or a device")
    met: dict[Path, str] = {}
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        name, real = Path(place).relative_to(root).as_posix(), Path(place).resolve()
        if (first := met.setdefault(real, name)) != name:
            folders.clear()
            digest.update(f"{name}\0{first}\0".encode())
            continue
        for path in (Path(place, name) for name in files):
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: expected files and folders, found a pipe or a device")
            if path.is_file() and not path.name.startswith("."):
                yield path


def _text(file: Path) -> bytes:
    return _samples(file) if file.stat().st_size > _MOST_TEXT_BYTES else file.read_bytes()


def _samples(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return stream.read()
        parts = []
        for i in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            parts.append(stream.read(_SAMPLE_BYTES))
        return b"".join(parts)


def path_and_number(text: str, *, is_path: bool) -> tuple[Path, float | None]:
    """Read "PATH:NUMBER", whose number is None where it is no finite one, or "PATH" alone, where it
    is 1; ``is_path`` says that all of it is a path, which may hold colons, C:\\ among them.
    """
    name, colon, number = text.rpartition(":")
    if is_path or not colon:
        return Path(text), 1.0
    try:
        value = float(number)
    except ValueError:
        return Path(name), None
    return Path(name), value if math.isfinite(value) else None
