"""Which share of the output's error a group has: measured by putting it back to float."""

from __future__ import annotations

from collections.abc import Iterable

from qcompiler.explaining.evidence import Built
from qcompiler.search.quality import CEILING, Quality


def error_shares(built: Built, groups: Iterable[str]) -> dict[str, float]:
    """Return, per group, the share of the error power at the worst output that is gone without its integer form.

    Nothing is returned where there are no set-aside feeds. Shares need not add up to one: errors cancel.

    Args:
        built: a build.
        groups: names of groups.
    """
    compilation, decisions = built.compilation, built.compiled.decisions
    judge, whole = compilation.judge, built.compiled.report.quality
    if judge is None or whole is None:
        return {}
    before = _power(whole)
    found: dict[str, float] = {}
    for name in groups:
        forms = {n: f for n, f in decisions.forms.items() if n != name}
        build = compilation.workshop.build(forms, decisions.engine_forms)
        after = _power(judge(compilation.workshop.computable(build)))
        found[name] = 0.0 if before <= 0 else (before - after) / before
    return found


def _power(quality: Quality) -> float:
    """Return error power over signal power at the worst output; 0 for outputs that are equal bit for bit."""
    return 0.0 if quality.worst >= CEILING else float(10.0 ** (-quality.worst / 10.0))
