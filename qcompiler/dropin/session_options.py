"""Session options that remember what a compiled model cannot honour."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort


class SessionOptions(ort.SessionOptions):  # type: ignore[misc]  # onnxruntime has no types
    """``onnxruntime.SessionOptions``; ONNX Runtime itself does not tell whether weights or operators were added."""

    def __init__(self) -> None:
        """Make default options."""
        super().__init__()
        self.qcompiler_calls: list[str] = []

    def add_initializer(self, name: str, ort_value: Any) -> None:
        """Give a weight from outside the model."""
        self.qcompiler_calls.append("add_initializer")
        super().add_initializer(name, ort_value)

    def add_external_initializers(self, names: Any, values: Any) -> None:
        """Give weights from outside the model."""
        self.qcompiler_calls.append("add_external_initializers")
        super().add_external_initializers(names, values)

    def add_external_initializers_from_files_in_memory(self, *arguments: Any) -> None:
        """Give files of weights from memory."""
        self.qcompiler_calls.append("add_external_initializers_from_files_in_memory")
        super().add_external_initializers_from_files_in_memory(*arguments)

    def register_custom_ops_library(self, path: str) -> None:
        """Load operators that the compiler does not know."""
        self.qcompiler_calls.append("register_custom_ops_library")
        super().register_custom_ops_library(path)
