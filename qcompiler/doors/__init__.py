"""Doors to other tools: torch, onnx-graphsurgeon, Microsoft Olive, Hugging Face Optimum; each needs its own package."""
