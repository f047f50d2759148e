"""A ControlNet or T2I-adapter that the user names, and whether it is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts.model_source import fingerprint, path_and_number
from quest_deploy.artifacts.schema import validated
from quest_deploy.errors import InputError
from quest_deploy.files import absolute

CONFIGURATION = "config.json"


@validated("ControlNet or T2I-adapter")
@dataclass(frozen=True)
class ScaledFolder:
    """The folder of a ControlNet or T2I-adapter in diffusers' layout, the scale of what it adds,
    and the folder's :func:`quest_deploy.artifacts.model_source.fingerprint`.
    """

    path: str
    scale: float
    fingerprint: str

    @classmethod
    def of(cls, given: Path | str, flag: str) -> ScaledFolder:
        """Read "FOLDER" or "FOLDER:SCALE"; raise InputError, which names the ``flag``, where there
        is no such folder, or the scale is no positive number.
        """
        path, scale = path_and_number(str(given), is_path=Path(given).is_dir())
        if scale is None or scale <= 0:
            raise InputError(
                f"{flag} {given}: expected FOLDER:SCALE with a finite scale above 0, such as "
                "canny:0.8"
            )
        if not (path / CONFIGURATION).is_file():
            raise InputError(
                f"{flag} {given}: expected its folder in diffusers' layout, and {path} has no "
                f"{CONFIGURATION}"
            )
        return cls(str(absolute(path)), scale, fingerprint(path))

    def check(self, flag: str) -> Path:
        """Its folder; raise InputError, which names the ``flag``, where it is another by now."""
        path = Path(self.path)
        if not path.is_dir() or fingerprint(path) != self.fingerprint:
            raise InputError(
                f"{path} was changed or removed meanwhile; restore it, or run `quest-deploy "
                f"calibrate {flag} DIR:SCALE` with another"
            )
        return path
