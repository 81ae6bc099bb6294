"""The static proof: compile kernels ahead of time, without a GPU, and read what the machine code holds."""
