"""Integer convolution: s8 activations in NHWC times s8 weights, as an implicit matrix product with a fused epilogue."""
