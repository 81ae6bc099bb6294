"""ONNX operators as torch functions: what a plan runs besides kernels. Importing it imports torch."""
