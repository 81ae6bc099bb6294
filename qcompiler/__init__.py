"""qcompiler: a graph-level quantization compiler for ONNX."""
