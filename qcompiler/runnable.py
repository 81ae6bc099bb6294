"""The model as this machine can run it: as given, or in float32 where the engine has no kernels for its half type."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.engine import Engine, EngineOptions, Runner
from qcompiler.errors import ModelError
from qcompiler.passes.widen_half_precision import WidenHalfPrecision
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import Target


def load_runnable(
    model: ir.Model, engine: Engine, options: EngineOptions, target: Target
) -> tuple[ir.Model, Runner, str]:
    """Load an imported model, widened to float32 if the engine does not take it as it is.

    ONNX Runtime has few kernels for bfloat16 on CPU, and refuses most models in it. Such a model is judged against
    the same model in float32, which rounds less.

    Returns:
        The model that runs, its runner, and what to tell the user: empty where it runs as given.

    Raises:
        ModelError: the engine takes it in neither form.
    """
    try:
        return model, engine.load(model, options), ""
    except ModelError as refused:
        state = CompileState(model.clone(), target)
        if not WidenHalfPrecision().run(state):
            raise
        try:
            runner = engine.load(state.model, options)
        except ModelError:
            raise refused from None
    half = "" if state.half is None else state.half.name.lower()
    note = (
        f"{engine.name} does not run the model's {half} here: speed and accuracy are compared with the same model in "
        "float32"
    )
    return state.model, runner, note
