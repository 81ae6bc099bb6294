"""Matrix product of 8-bit floats (e4m3) with scales per tensor, row and channel, or block."""
