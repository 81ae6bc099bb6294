"""Element by element: sums and products of quantized tensors, tables of functions, conversions between scales."""
