"""Quantizers: pure tensor functions, the modules above them, which tensors get one."""
