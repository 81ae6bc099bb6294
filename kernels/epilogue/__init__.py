"""What matrix kernels do with their sums: bias, residual, activation and the rounding to the output's format."""
