"""``int4_matmul``: activations in 16 bits times weights of 4 or 8 bits in blocks, dequantized on the way."""
