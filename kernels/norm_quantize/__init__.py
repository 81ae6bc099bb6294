"""Normalization of rows and quantization of the result, in one pass over memory."""
