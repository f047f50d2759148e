"""What engines are worth: images, quality, speed, memory, realised precision."""

FEW_IMAGES = 100
"""With fewer, the covariances of a Frechet distance are those of a handful of points."""
