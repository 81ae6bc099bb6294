"""``int4_matvec``: up to 64 rows of activations times weights of 4 or 8 bits in blocks."""
