"""Tuning in two halves: candidates are compiled and ranked without a GPU, the survivors are timed on one."""
