"""Quantization itself: formats, specifications, parameters, the plan, and the NumPy truth of the arithmetic."""
