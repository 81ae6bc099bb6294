"""TensorRT 11 and TensorRT for RTX: probe, prove, build and run; nothing here needs either of them to be imported."""
