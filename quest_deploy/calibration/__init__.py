"""Post-training quantization: trajectories, ranges, Q-Diffusion's reconstruction, sensitivity."""
