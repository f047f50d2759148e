"""Verification of an engine against the fake-quantized model, aware of rounding ties."""
