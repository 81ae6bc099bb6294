"""Driving rules over a model: indexed by root operator, worklist in program order, every refusal explained."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.ir.analysis import open_graphs
from qcompiler.ir.graph import const_array, consumers, origins
from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.language import BuildResult, Rule
from qcompiler.patterns.match import Match, find_matches, unsafe

REACH = 16
"""How many nodes downstream of a change are looked at again (patterns are less deep)."""
_NO_MATCH = ("no-match", "a structural clause refused")


@dataclass(frozen=True)
class RuleRemark:
    """What one rule did at one node, or why it did not although the pattern was there.

    Attributes:
        rule: the rule's name.
        node: the root node's name.
        reason: kebab-case code; ``fired`` if the rule acted.
        text: one sentence.
        done: whether the rule acted.
    """

    rule: str
    node: str
    reason: str
    text: str = ""
    done: bool = False


@dataclass
class RewriteReport:
    """Counts per rule, and the near misses.

    Attributes:
        fired: how often each rule acted.
        tried: how often the pattern itself matched.
        refused: per rule, how often each reason spoke against a match at the end.
        remarks: firings in order, then the near misses that remain.
        stands_for: (name of a value that is gone, name of the one in its place), in order.
    """

    fired: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    remarks: list[RuleRemark] = field(default_factory=list)
    stands_for: list[tuple[str, str]] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """Return how often any rule acted."""
        return sum(self.fired.values())

    def reasons(self, rule: str) -> tuple[str, ...]:
        """Return the reason codes for which a rule declined, most frequent first."""
        return tuple(code for code, _ in self.refused.get(rule, Counter()).most_common())


def apply_rules(
    model: ir.Model,
    rules: Sequence[Rule],
    *,
    on_remark: Callable[[RuleRemark], None] | None = None,
    max_firings: int | None = None,
    allow: Callable[[str, ir.Node], bool] | None = None,
) -> RewriteReport:
    """Apply rules until none fires any more.

    Args:
        model: changed in place.
        rules: tried in this order at each node.
        on_remark: called with every firing, then with every near miss that remains.
        allow: asked with the rule's name and the root right before each firing; False leaves the node as it is.
        max_firings: bound on the number of firings; by default it grows with the model.
        allow: asked with the rule's name and the root right before each firing; false forbids it (bisecting does).

    Raises:
        PassError: two rules undo each other, the bound is exceeded, or a rule changes the type or shape of a value.
    """
    run = _Run(model, rules, max_firings, allow)
    run.drive()
    run.finish()
    if on_remark is not None:
        for remark in run.report.remarks:
            on_remark(remark)
    return run.report


class _Run:
    def __init__(
        self,
        model: ir.Model,
        rules: Sequence[Rule],
        max_firings: int | None,
        allow: Callable[[str, ir.Node], bool] | None = None,
    ) -> None:
        self.model = model
        self.allow = allow
        self.rewriter = Rewriter(model)
        self.opset = model.opset_imports.get("", model.graph.opset_imports.get("", 0))
        self.index: dict[tuple[str, str], list[Rule]] = {}
        names = Counter(rule.name for rule in rules)
        if doubled := [name for name, count in names.items() if count > 1]:
            raise PassError(f"two rules are named {doubled[0]!r}; a rule's name is unique")
        for rule in rules:
            for root in rule.roots():
                self.index.setdefault(root, []).append(rule)
        total = sum(len(graph) for graph in open_graphs(model))
        self.max_firings = max_firings if max_firings is not None else 1000 + 50 * total
        self.report = RewriteReport()
        self.misses: dict[tuple[str, str], RuleRemark] = {}
        self.history: dict[ir.Node, tuple[tuple[str, str], ...]] = {}

    def drive(self) -> None:
        """Visit all nodes in program order, then again those near a change, until nothing changes."""
        todo: set[ir.Node] | None = None
        while todo is None or todo:
            touched: set[ir.Node] = set()
            for graph in list(open_graphs(self.model)):
                for node in list(graph):
                    if node.graph is graph and (todo is None or node in todo):
                        touched |= self.visit(node)
            todo = touched

    def visit(self, node: ir.Node) -> set[ir.Node]:
        """Try the rules at one node; return the nodes to look at again."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        for rule in self.index.get((domain, node.op_type), ()):
            found = self.search(rule, node)
            if found is not None and (self.allow is None or self.allow(rule.name, node)):
                return self.fire(rule, found)
        return set()

    def search(self, rule: Rule, node: ir.Node) -> Match | None:
        """Return the first match that no clause and no safety rule refuses; keep the first refusal otherwise."""
        refusal: RuleRemark | None = None
        name = node.name or ""
        for found in find_matches(rule.match, node, self.opset):
            reason = self.refuse(rule, found)
            if reason is _NO_MATCH:
                continue
            self.report.tried[rule.name] += 1
            if reason is None:
                self.misses.pop((rule.name, name), None)
                return found
            if refusal is None:
                refusal = RuleRemark(rule.name, name, reason[0], reason[1])
        if refusal is not None:
            self.misses[(rule.name, name)] = refusal
        return None

    def refuse(self, rule: Rule, found: Match) -> tuple[str, str] | None:
        """Return why a match must not be rewritten, or None."""
        for clause in rule.where:
            reason = clause.check(found)
            if reason is not None and clause.structural:
                return _NO_MATCH
            if reason is not None:
                code, _, text = reason.partition(": ")
                return code, text or f"where {clause.name}"
        return unsafe(found, rule.keeps)

    def fire(self, rule: Rule, found: Match) -> set[ir.Node]:
        """Build the replacement, put it in place, and return the nodes to look at again."""
        root, name = found.root, found.root.name or ""
        past = self.chronicle(rule, found)
        around = self.surroundings(found)
        builder = Builder(self.rewriter, found)
        result = rule.build(builder, found)
        self.report.fired[rule.name] += 1
        self.report.remarks.append(RuleRemark(rule.name, name, "fired", rule.doc, done=True))
        if self.report.changes > self.max_firings:
            raise PassError(
                f"rule {rule.name} at {name}: more than {self.max_firings} rewrites in one run; "
                "a rule keeps firing on its own result"
            )
        for new, old in self.replacements(rule, found, result):
            self.report.stands_for.append((str(old.name), str(new.name)))
            self.rewriter.replace(old, new)
            around |= set(consumers(new))
            if (producer := new.producer()) is not None:
                around.add(producer)
        for made in builder.made:
            self.history[made] = past
        self.rewriter.erase_dead(found.nodes)
        if root.graph is not None:
            self.history[root] = past
        return self.downstream({*around, *builder.made})

    def replacements(self, rule: Rule, found: Match, result: BuildResult) -> list[tuple[ir.Value, ir.Value]]:
        """Return (new, old) for each output of the root that is replaced, checked for type and shape."""
        root = found.root
        made = result if isinstance(result, tuple) else (result,)
        if len(made) > len(root.outputs):
            raise PassError(f"rule {rule.name} at {root.name}: {len(made)} results for {len(root.outputs)} outputs")
        pairs = []
        for new, old in zip(made, root.outputs, strict=False):
            if new is old:
                continue
            _check(rule, root, new, old)
            pairs.append((new, old))
        return pairs

    def chronicle(self, rule: Rule, found: Match) -> tuple[tuple[str, str], ...]:
        """Return the past of the root with this firing; raise if it was there before.

        Only the root's own past counts: joining a long chain meets equal expressions at one node after another.
        """
        past = self.history.get(found.root, ())
        step = (rule.name, _fingerprint(found))
        if step in past:
            others = [name for name, _ in past[past.index(step) :] if name != rule.name]
            other = others[0] if others else rule.name
            raise PassError(
                f"rules {rule.name} and {other} undo each other at {found.root.name} "
                f"(from {', '.join(origins(found.root)) or 'no imported node'}); drop one of them from the pass"
            )
        return (*past, step)

    def surroundings(self, found: Match) -> set[ir.Node]:
        """Return the readers of what the match reads: their number of uses may change."""
        nodes: set[ir.Node] = set()
        for node in found.nodes:
            for value in node.inputs:
                if value is not None and not value.is_initializer():
                    nodes.update(consumers(value))
            for value in node.outputs:
                nodes.update(consumers(value))
        return nodes

    def downstream(self, nodes: set[ir.Node]) -> set[ir.Node]:
        """Return the nodes and their readers, `REACH` steps far."""
        found, edge = set(nodes), set(nodes)
        for _ in range(REACH):
            edge = {reader for node in edge for value in node.outputs for reader in consumers(value)} - found
            if not edge:
                break
            found |= edge
        return found

    def finish(self) -> None:
        """Count the near misses that remain."""
        alive = {node.name or "" for graph in open_graphs(self.model) for node in graph}
        for (rule, node), remark in self.misses.items():
            if node in alive:
                self.report.refused.setdefault(rule, Counter())[remark.reason] += 1
                self.report.remarks.append(remark)


def _check(rule: Rule, root: ir.Node, new: ir.Value, old: ir.Value) -> None:
    """Require that a replacement has the type and shape of what it replaces; complete what one side knows."""
    if new.type is None:
        new.type = old.type
    elif old.dtype is not None and new.dtype != old.dtype:
        raise PassError(f"rule {rule.name} at {root.name}: {old.name} is {old.dtype}, its replacement {new.dtype}")
    if old.shape is None:
        return
    if new.shape is None:
        new.shape = old.shape
        return
    clash = len(new.shape) != len(old.shape) or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(new.shape, old.shape, strict=True)
    )
    if clash:
        raise PassError(f"rule {rule.name} at {root.name}: {old.name} is {old.shape}, its replacement {new.shape}")
    if new.const_value is None and not new.is_graph_input():
        new.shape = ir.Shape(
            [a if isinstance(a, int) or (not isinstance(b, int) and b.value is None) else b
             for a, b in zip(new.shape, old.shape, strict=True)]
        )  # fmt: skip


def _fingerprint(found: Match) -> str:
    """Return a text that is equal for equal expressions over the same inputs."""
    inside = {id(node): index for index, node in enumerate(found.nodes)}
    parts = []
    for node in found.nodes:
        attributes = sorted((k, str(a.value)) for k, a in node.attributes.items())
        parts.append(f"{node.domain}.{node.op_type}{attributes}({','.join(_leaf(v, inside) for v in node.inputs)})")
    return ";".join(parts)


def _leaf(value: ir.Value | None, inside: dict[int, int]) -> str:
    if value is None:
        return "-"
    producer = value.producer()
    if producer is not None and id(producer) in inside:
        return f"%{inside[id(producer)]}"
    if value.is_initializer():
        array = const_array(value)
        if array is not None and array.dtype.kind not in "OSU":
            return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    return value.name or ""
