"""Compile a model for a target, or for the best of the engines on this processor."""

from __future__ import annotations

from qcompiler.best_engine import CPU, compile_for_cpu
from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.options import ModelSource, Options


def compile_model(source: ModelSource, options: Options) -> CompiledModel:
    """Compile one model; `qcompiler.compile` is the public face.

    Raises:
        QCompilerError: bad input, with what to do about it.
    """
    return compile_for_cpu(source, options) if options.target == CPU else Compilation(source, options).run()
