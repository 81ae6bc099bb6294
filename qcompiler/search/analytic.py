"""What a choice of forms costs where nothing can be timed: by the work of its products, and each form's share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qcompiler.ir.analysis import macs
from qcompiler.quant.plan import Form
from qcompiler.targets.groups import Group

SHARE: Mapping[Form, float] = {"float": 1.0, "static": 0.5, "static-float": 0.5, "dynamic": 0.6, "weight-only": 0.3}
"""Time of a product in a form, by that in float: tensor cores do twice as many products of 8 bits as of 16, and a
product bound by reading its weights takes their share of the bytes (4 bits and a scale against 16)."""


def analytic_cost(groups: Sequence[Group]) -> Callable[[Mapping[str, Form]], float]:
    """Return a function from forms to a predicted time, in arbitrary units.

    Args:
        groups: all groups of a model; only products have a cost. Open axes count as 1.
    """
    work = {g.name: float(macs(g.root) or 0) for g in groups if g.row.kind in ("weighted", "recurrent")}

    def predict(forms: Mapping[str, Form]) -> float:
        return sum(amount * SHARE[forms.get(name, "float")] for name, amount in work.items())

    return predict
