"""Our operators: for each one definition, as ONNX and as NumPy."""
