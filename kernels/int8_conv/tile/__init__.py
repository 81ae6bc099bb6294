"""What the kernels of ``int8_conv`` have in common: where a tile lies, and how its sums are stored."""
