"""stable-diffusion.cpp's file of a pipeline in diffusers' layout.

python -m scripts.bench.image.workers.convert_sdcpp FOLDER FILE q8_0|q4_0
"""

from __future__ import annotations

import sys

from stable_diffusion_cpp import StableDiffusion


def main(folder: str, path: str, kind: str) -> None:
    """Convert; exit with 1 where the package could not."""
    if not StableDiffusion().convert(folder, output_path=path, output_type=kind):
        sys.exit(f"stable-diffusion.cpp could not convert {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
