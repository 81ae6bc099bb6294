"""The drop-in for ONNX Runtime: options, cache, self-calibration, and the session; `qcompiler.ort` is its face."""
