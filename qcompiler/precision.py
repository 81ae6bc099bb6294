"""Float precision on engines that compute floats in less than float32 by themselves."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompiler.workshop import Workshop


def settle_precision(workshop: Workshop, shortfall: Callable[[], float]) -> float:
    """Ask for float32 in every later build where the engine's own preference misses the bounds without any integers.

    Args:
        workshop: its engine forms are extended, if that brings the float build closer to the bounds.
        shortfall: by how much the float build, as the workshop makes it, misses the bounds, in dB-like units.

    Returns:
        by how much the bounds were missed before, 0 where nothing was changed.
    """
    exact = workshop.backend.exact_forms
    if not exact or (short := shortfall()) <= 0:
        return 0.0
    workshop.engine_forms |= exact
    if short - shortfall() <= 0:  # that is not what is wrong
        for key in exact:
            del workshop.engine_forms[key]
        return 0.0
    return short


def in_precision_of(workshop: Workshop, model: ir.Model) -> ir.Model:
    """Return a model that asks its engine for float32 where the workshop's builds do."""
    exact = workshop.backend.exact_forms
    asked = {key: value for key, value in workshop.engine_forms.items() if key in exact}
    if not asked:
        return model
    made = model.clone()
    made.metadata_props.update(asked)
    return made
