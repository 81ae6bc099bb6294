"""Loop for ONNX's reference evaluator, as the specification has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx.reference.ops.op_loop import Loop as OnnxLoop

from qcompiler.engine import Array


class Loop(OnnxLoop):
    """ONNX Loop.

    The evaluator's own (onnx 1.23) runs no iteration where the condition is left out, and joins scan outputs along
    their first axis instead of stacking them along a new one.
    """

    op_domain = ""
    # Set by the evaluator's own constructor, from the node's attributes.
    body: Any
    _run_body: Callable[..., Sequence[Any]]

    def _run(
        self,
        trips: Array | None,
        condition: Array | None,
        *states: Any,
        context: Mapping[str, Any] | None = None,
        body: Any = None,
        attributes: Mapping[str, Any] | None = None,
        bindings: Any = None,
    ) -> tuple[Any, ...]:
        names = self.body.input_names
        go = condition is None or bool(np.all(condition))
        rows: list[list[Array]] = [[] for _ in range(self.K)]
        count = 0
        while go and (trips is None or count < int(np.reshape(trips, ()))):
            inner = {names[0]: np.asarray(count, np.int64), names[1]: np.asarray(go)}
            feeds = {**(context or {}), **inner, **dict(zip(names[2:], states, strict=True))}
            made = self._run_body(feeds, attributes=attributes, bindings=bindings)
            go, states = bool(np.all(made[0])), tuple(made[1 : 1 + self.N])
            for row, value in zip(rows, made[1 + self.N :], strict=True):
                row.append(value)
            count += 1
        # Without an iteration nothing tells the shape of a row.
        stacked = [np.stack(row) if row else np.zeros(0, np.float32) for row in rows]
        return self._check_and_fix_outputs((*states, *stacked))
