"""Graph services on onnx-ir: import, text, verification, rewriting and analyses."""
