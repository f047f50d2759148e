"""Quantizers: pure tensor functions (affine), the modules above them (layers), sites, calibration."""
