"""From a checkpoint to graphs: the portable ONNX file, and its lowering for each backend."""
