"""Treatments: changes to a float model, or to how it is rounded, that make its integers more accurate where they pay.

Each is tried on top of those kept before it, and kept where the gain was measured: `try_treatments`. Biases are
corrected last, for the forms and ranges that were chosen: `correct_final`. What was kept is repeated from its
parameters, without measuring: `replay_treatments`.
"""

from qcompiler.treatments.treatment import Case, Parameters, Treatment
from qcompiler.treatments.trying import (
    LAST,
    TREATMENTS,
    Terms,
    Treated,
    correct_final,
    replay_treatments,
    try_treatments,
)

__all__ = [
    "LAST",
    "TREATMENTS",
    "Case",
    "Parameters",
    "Terms",
    "Treated",
    "Treatment",
    "correct_final",
    "replay_treatments",
    "try_treatments",
]
