"""The diffusion models the toolchain knows, and how each is conditioned, sampled and judged."""
