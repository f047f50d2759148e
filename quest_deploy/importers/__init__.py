"""Checkpoints that the official QuEST and Q-Diffusion code wrote, read exactly."""
