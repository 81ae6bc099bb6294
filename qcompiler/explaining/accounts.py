"""Accounts of nodes and groups: form, causes in order, numbers, rules tried, shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from qcompiler.explaining.causes import Cause, NodeAccount, Place, Tried, cause
from qcompiler.explaining.evidence import Evidence, origins_of
from qcompiler.explaining.finding import find_node
from qcompiler.ir.analysis import macs
from qcompiler.ir.graph import is_const, is_op, origins, rank_of, single_consumer
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.quant.plan import use_point
from qcompiler.targets.groups import Group

_CODE = re.compile(
    r"(?P<code>[a-z0-9]+(?:-[a-z0-9]+)+|constant|captured|layout|peephole|dilations): (?P<text>.*)", re.S
)
_SAID = (
    ("by override", "override", "user"),
    ("the accuracy guard measured", "accuracy-guard", "guard"),
    ("for accuracy", "accuracy-guard", "guard"),
    ("its region was measured", "region-slower", "measurement"),
    ("no integer form of the model", "model-slower", "measurement"),
    ("nothing around it", "no-integer-neighbour", "plan"),
    ("measured", "measured-slower", "measurement"),
)
"""How sentences of a build begin, the code that they stand for and who says so."""
_BENIGN = frozenset({"larger-group", "other-group"})
"""Refusals of a rule that leave a node to a better one."""
_INTEGER = ("static", "static-float", "dynamic", "weight-only")


def account_for(evidence: Evidence, name: str) -> NodeAccount:
    """Explain one node by any of its names.

    Raises:
        ExplainError: nothing has the name.
    """
    node = find_node(evidence, name)
    if node is None:
        return _vanished(evidence, name)
    group = evidence.owner.get(str(node.name))
    if group is not None:
        return group_account(evidence, group, str(node.name))
    return _lone(evidence, node)


def group_accounts(evidence: Evidence) -> tuple[NodeAccount, ...]:
    """Explain every group, and every other operator that computes, in program order."""
    made = []
    for name, node in evidence.nodes.items():
        group = evidence.owner.get(name)
        if group is None:
            if not is_op(node, "Constant") and not _is_bookkeeping(node):
                made.append(_lone(evidence, node))
        elif group.root is node:
            made.append(group_account(evidence, group, name))
    return tuple(made)


def group_account(evidence: Evidence, group: Group, asked: str) -> NodeAccount:
    """Explain a group."""
    form = evidence.forms.get(group.name, "float")
    total = sum(macs(n) or 0 for n in evidence.nodes.values())
    time = evidence.times.get(group.name)
    why = evidence.why.get(group.name, "")
    return NodeAccount(
        node=asked,
        operator=group.root.op_type if asked == group.name else evidence.nodes[asked].op_type,
        group=group.name,
        members=tuple(f"{n.name} ({n.op_type})" for n in group.nodes),
        origins=origins_of(evidence, group),
        form=form,
        why=why or ("" if form == "float" else f"{form}: by recipe"),
        causes=_float_causes(evidence, group) if form == "float" else _other_causes(evidence, group, form),
        places=tuple(_places(evidence, group)),
        tried=_tried(evidence, [str(n.name) for n in group.nodes]),
        kernel=evidence.kernels.get(group.name, ""),
        macs_share=None if not total else (macs(group.root) or 0) / total,
        time_us=time,
        time_share=None if time is None or not evidence.total_time else time / evidence.total_time,
        notes=_notes(evidence, group, form),
    )


# ---- causes ---------------------------------------------------------------------------------------------------------


def _float_causes(evidence: Evidence, group: Group) -> tuple[Cause, ...]:
    """Return why a group is float: what rules all forms out, what was decided, then what rules single forms out."""
    refusals = [_clearer(group, cause(code, text, "target", form)) for form, code, text in group.refusals]
    found: list[Cause] = [] if group.legal else list(refusals)
    said = evidence.why.get(group.name, "")
    if group.legal and said:
        told = _said(said)
        # The graph says more exactly which neighbour it is.
        found += [_unreached(evidence, group) if c.code == "no-integer-neighbour" else c for c in told]
    observed = [r for r in _remarks(evidence, group.name, "plan-quantization") if r["reason"] in _CALIBRATION]
    dynamic = any(f in ("dynamic", "weight-only") for f in group.legal)
    about = [cause(r["reason"], r["text"], "calibration") for r in observed]
    # Without ranges a dynamic form is left: then whoever left that out is the first cause.
    found = [*found, *about] if dynamic and found else [*about, *found]
    if group.name in evidence.refused:
        found += _coded(evidence.refused[group.name], "engine")
    if group.legal and not found:
        found.append(_unreached(evidence, group))
    if group.legal:
        found += refusals
    return _distinct(found)


_CALIBRATION = ("never-observed", "no-calibration")


def _other_causes(evidence: Evidence, group: Group, form: str) -> tuple[Cause, ...]:
    """Return what stands in the way of a planned integer form: the engine, or a rule; then better forms ruled out."""
    found: list[Cause] = []
    for name, code, text in evidence.missed:
        if name == group.name:
            found.append(cause(code, text, "engine"))
    if not found:
        found += _rule_causes(evidence, group)
    found += [c for f, code, text in group.refusals if f != form for c in [cause(code, text, "target", f)]]
    return _distinct(found)


def _rule_causes(evidence: Evidence, group: Group) -> list[Cause]:
    """Return why no fusing rule fired at a group that the plan quantizes."""
    tried = [t for t in _tried(evidence, [str(n.name) for n in group.nodes]) if t.by == FuseQdq.name()]
    if any(t.done for t in tried):
        return []
    return [
        _clearer(group, cause(t.reason, t.text, f"rule {t.rule}")) for t in tried if t.reason not in _BENIGN
    ]  # fmt: skip


def _clearer(group: Group, found: Cause) -> Cause:
    """Return a cause that only an unknown rank makes one as what it is."""
    if found.code == "bias-shape" and "may add axes" in found.text and rank_of(group.root.outputs[0]) is None:
        text = f"the rank of {group.root.outputs[0].name} is not known, so the bias may add axes to it"
        return cause("unknown-rank", text, found.who, found.form)
    return found


def said_causes(why: str) -> tuple[Cause, ...]:
    """Return the cause that a build's sentence on a float group states."""
    return tuple(_said(why))


def _said(why: str) -> list[Cause]:
    """Return the cause behind a build's sentence on a group."""
    text = why.partition("float: ")[2] if why.startswith("float: ") else why
    for start, code, who in _SAID:
        if text.startswith(start):
            return [cause(code, text, who)]
    return _coded(text, "plan")


def _coded(text: str, who: str) -> list[Cause]:
    match = _CODE.fullmatch(text)
    return [cause(match["code"], match["text"], who)] if match else [cause("recipe-float", text, who)]


def _unreached(evidence: Evidence, group: Group) -> Cause:
    """Return why a legal group was left in float by the rules of placement."""
    if not evidence.calibrated and not any(f in ("dynamic", "weight-only") for f in group.legal):
        text = f"there is no calibration data, and {group.root.op_type} has static forms only"
        return cause("no-calibration", text, "calibration")
    if not evidence.told:
        return cause("not-recorded", "the dump has the choice, not the reason: measurement or the recipe", "plan")
    if group.row.kind in ("weighted", "recurrent"):
        return cause("recipe-float", f"the recipe leaves {group.root.op_type} in float", "plan")
    if not evidence.arithmetic:
        return cause("recipe-float", "the recipe leaves operators between quantized ones in float", "plan")
    for value in group.data:
        producer = value.producer()
        other = evidence.owner.get(str(producer.name)) if producer is not None else None
        if producer is None:
            return cause("no-integer-neighbour", f"it reads the graph input {value.name}, which is float", "plan")
        if other is None:
            text = f"it reads {value.name} from {producer.name} ({producer.op_type}), which has no integer form"
            return cause("no-integer-neighbour", text, "plan")
        if evidence.forms.get(other.name) != "static":
            text = f"it reads {value.name} from {other.name} ({other.root.op_type}), which writes float"
            first = _float_causes(evidence, other) if evidence.forms.get(other.name, "float") == "float" else ()
            return cause("no-integer-neighbour", text + (f" ({first[0].code})" if first else ""), "plan")
    return cause("no-integer-neighbour", "no integer operator computes with its result", "plan")


def _distinct(causes: list[Cause]) -> tuple[Cause, ...]:
    """Drop repeated causes; one that stands in the way of several forms names them all."""
    made: dict[tuple[str, str], Cause] = {}
    for found in causes:
        key = (found.code, found.text)
        if (old := made.get(key)) is not None:
            forms = dict.fromkeys(f for f in (*old.form.split(", "), found.form) if f)
            made[key] = Cause(old.code, old.text, old.who, ", ".join(forms), old.advice)
        else:
            made[key] = found
    return tuple(made.values())


def _remarks(evidence: Evidence, node: str, pass_name: str = "") -> list[Mapping[str, Any]]:
    return [
        r for r in evidence.remarks if r["node"] == node and not r["done"] and pass_name in ("", r["pass_name"])
    ]  # fmt: skip


def _tried(evidence: Evidence, names: list[str]) -> tuple[Tried, ...]:
    """Return the rules that were tried at some nodes; a miss that a later firing mended is left out."""
    found = [
        Tried(r["rule"], r["node"], r["reason"], r["text"], bool(r["done"]), r["pass_name"])
        for r in evidence.remarks
        if r["rule"] and (r["node"] in names or r["node"].removesuffix("/QuantizeLinear") in names)
    ]
    return tuple(dict.fromkeys(sorted(found, key=lambda t: not t.done)))


# ---- numbers --------------------------------------------------------------------------------------------------------


def _places(evidence: Evidence, group: Group) -> list[Place]:
    form = evidence.forms.get(group.name, "float")
    root, row = group.root, group.row
    places = []
    for value in group.data:
        name = str(value.name)
        key = f"{name}@dynamic" if form == "dynamic" and row.kind != "recurrent" else name
        kept = form in ("static", "static-float", "dynamic")
        places.append(_place(evidence, "input", name, key if kept else "", _type(value)))
    for index, role in ((row.weight, "weight"), (row.bias, "bias")):
        if 0 <= index < len(root.inputs) and root.inputs[index] is not None:
            constant = root.inputs[index]
            assert constant is not None
            places.append(_place(evidence, role, str(constant.name), use_point(group.name, index), _type(constant)))
    for value in group.results:
        name = str(value.name)
        places.append(_place(evidence, "output", name, name if form == "static" else "", _type(value)))
    return places


def _type(value: ir.Value) -> str:
    name = "float" if value.dtype is None else value.dtype.name.lower()
    return "float32" if name == "float" else name


def _place(evidence: Evidence, role: str, value: str, key: str, plain: str = "float32") -> Place:
    point = evidence.points.get(key) if key else None
    if point is None:
        return Place(role, value, plain)
    scale = point.get("scale")
    zero = point.get("zero_point")
    return Place(
        role,
        value,
        _format(point),
        _source(point),
        () if scale is None else tuple(scale) if isinstance(scale, list | tuple) else (scale,),
        () if zero is None else tuple(zero) if isinstance(zero, list | tuple) else (zero,),
        tuple(point.get("range", ())),
        point.get("expected_db"),
    )


def _format(point: Mapping[str, Any]) -> str:
    parts = [str(point["format"])]
    if point.get("bits"):
        parts.append(f"{point['bits']} bits")
    if point.get("block"):
        parts.append(f"blocks of {point['block']} along axis {point['axis']}")
    elif point.get("axis") is not None:
        parts.append(f"per channel of axis {point['axis']}")
    if point.get("symmetric"):
        parts.append("symmetric")
    return ", ".join(parts)


def _source(point: Mapping[str, Any]) -> str:
    kind = str(point["kind"])
    if point.get("dynamic"):
        return "found at run time"
    if kind == "observed":
        return f"observed, {point.get('estimator') or 'min-max'}"
    if kind == "shared":
        root = point.get("root") or (point.get("points") or ["?"])[0]
        estimator = f" (observed, {point['estimator']})" if point.get("estimator") else ""
        return f"shared with {root}{estimator}"
    if kind == "derived":
        return f"derived: {' x '.join(point.get('points', ()))}"
    return {"fixed": "fixed (imported, or the operator's own)", "weight": "from the constant itself"}.get(kind, kind)


# ---- nodes without a group ------------------------------------------------------------------------------------------


def _is_bookkeeping(node: ir.Node) -> bool:
    """Return whether a node computes no floating-point numbers: shapes, indices, control flow."""
    out = next((v for v in node.outputs if v.name), None)
    return out is None or out.dtype is None or not out.dtype.is_floating_point()


def _lone(evidence: Evidence, node: ir.Node) -> NodeAccount:
    name = str(node.name)
    closed = [r for r in _remarks(evidence, name, "plan-quantization") if r["reason"] == "closed-body"]
    if closed:
        found = cause("closed-body", closed[0]["text"], "target")
    elif _is_bookkeeping(node):
        found = cause("not-a-group", f"{node.op_type} computes no floating-point numbers", "target")
    elif node.op_type in evidence.target.activations:
        found = _outside(evidence, node)
    else:
        text = evidence.target.supports(node.op_type, "static") or f"{node.op_type} is in no group"
        found = cause("no-integer-kernel", text, "target")
    return NodeAccount(
        name, node.op_type, origins=origins(node), causes=(found,), tried=_tried(evidence, [name]),
        notes=_rule_notes(evidence, origins(node)),
    )  # fmt: skip


def _outside(evidence: Evidence, node: ir.Node) -> Cause:
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if source is None or producer is None or str(producer.name) not in evidence.owner:
        text = f"{node.op_type} goes with the operator in front of it, and that has no integer kernel"
        return cause("activation-outside", text, "target")
    if single_consumer(source) is not node:
        others = [str(u.node.name) for u in source.uses() if u.node is not node] or ["a graph output"]
        text = f"{source.name} is also read by {others[0]}, so {node.op_type} cannot go with {producer.name}"
        return cause("activation-outside", text, "target")
    return cause("activation-outside", f"{producer.op_type} takes no {node.op_type} along here", "target")


def _vanished(evidence: Evidence, name: str) -> NodeAccount:
    rules = [c for c in evidence.changes if name in c.origins]
    heirs = [str(n.name) for n in evidence.nodes.values() if name in origins(n)]
    if rules:
        last = rules[-1]
        text = f"rule {last.rule} at {last.node} took it in"
    else:
        text = "it computed nothing that the outputs need beyond what is left, or a constant"
    if heirs:
        text += f"; see {', '.join(heirs[:3])}"
    return NodeAccount(
        name, evidence.imported[name], origins=(name,), form="gone", causes=(cause("folded", text, "plan"),)
    )


def _notes(evidence: Evidence, group: Group, form: str) -> tuple[str, ...]:
    notes = list(_rule_notes(evidence, origins_of(evidence, group)))
    for node in group.nodes:
        for remark in evidence.remarks:
            if remark["node"] == node.name and remark["reason"] == "activation-not-redundant":
                notes.append(f"{node.name}: {remark['text']}")
    for name in (str(v.name) for v in (*group.data, *group.results)):
        for remark in evidence.remarks:
            if remark["node"] == name and remark["reason"] == "replanned":
                notes.append(f"{name}: {remark['text']}")
    if form != "float" and not evidence.proven:
        notes.append("nothing was proven: the engine's graph was not read")
    if any(is_const(v) for v in group.root.inputs[:1]):
        notes.append("its first input is a constant")
    return tuple(dict.fromkeys(notes))


def _rule_notes(evidence: Evidence, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what canonicalization did with the imported nodes behind something."""
    made = []
    for change in evidence.changes:
        touched = [o for o in change.origins if o in names]
        if touched:
            made.append(f"canonicalization: {change.rule} at {change.node}")
    return tuple(dict.fromkeys(made))
