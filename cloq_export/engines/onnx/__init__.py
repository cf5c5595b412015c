"""ONNX Runtime: the float graph, the quantized graph and the engine that runs it."""
