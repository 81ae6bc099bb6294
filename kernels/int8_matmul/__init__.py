"""Integer matrix product: s8 activations times s8 weights, with zero points, scales and a fused epilogue."""
