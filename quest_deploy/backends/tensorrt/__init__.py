"""TensorRT, in both flavours: the SDK with our plugin, and TensorRT for RTX."""
