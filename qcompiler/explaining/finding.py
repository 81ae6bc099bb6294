"""From the name that a user gives to the node that is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from qcompiler.explaining.evidence import Evidence, ExplainError
from qcompiler.ir.graph import origins


def find_node(evidence: Evidence, name: str) -> ir.Node | None:
    """Return the node of the canonical graph that a name stands for; None for one that a pass took away.

    A name is that of a node in the canonical graph, of an imported node (what came of it), or of a value (its
    producer).

    Raises:
        ExplainError: nothing has the name; the text suggests some that are like it.
    """
    if name in evidence.nodes:
        return evidence.nodes[name]
    descended = [n for n in evidence.nodes.values() if name in origins(n)]
    if descended:
        # What has the fewest origins says most of this one.
        return min(descended, key=lambda n: (str(n.name) not in evidence.owner, len(origins(n))))
    if name in evidence.writers:
        return evidence.writers[name]
    if name in evidence.imported:
        return None
    known = [*evidence.nodes, *evidence.imported, *evidence.writers]
    raise unknown_node(name, known)


def unknown_node(name: str, known: Iterable[str]) -> ExplainError:
    """Return the error for a name that nothing has."""
    found = suggestions(name, list(dict.fromkeys(known)))
    hint = f"did you mean {' or '.join(map(repr, found))}?" if found else "leave NODE away for a list"
    return ExplainError(f"no node, origin or value is named {name!r}; {hint}")


def suggestions(name: str, known: Sequence[str], most: int = 3) -> list[str]:
    """Return the names most like one that is not known."""
    folded = {k.casefold(): k for k in reversed(known)}
    wanted = name.casefold()
    inside = [k for k in known if wanted and wanted in k.casefold()]
    near = [folded[k] for k in difflib.get_close_matches(wanted, list(folded), most, 0.6)]
    return list(dict.fromkeys([*near, *sorted(inside, key=len)]))[:most]
