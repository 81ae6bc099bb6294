"""Compile several graphs in one build: encoder and decoder, plain and cached decoder."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qcompiler.agreement import Decided, SharedWeight, Spec, agree, find_shared, specs_of
from qcompiler.best_engine import CPU
from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.compiled_set import CompiledSet, WeightRow
from qcompiler.compiler import compile_model
from qcompiler.decisions import SetDecisions
from qcompiler.engine import ShapeRange
from qcompiler.errors import ModelError, PassError, QCompilerError
from qcompiler.ir.reader import read_model
from qcompiler.links import link_graphs
from qcompiler.options import ModelSource, Options
from qcompiler.quant.plan import QuantPlan

Lengths = Mapping[str, Sequence[int] | ShapeRange]

_FORBIDDEN = frozenset('/\\:<>"|?*=')
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
)
"""Names of devices on Windows, with any suffix."""
_LONGEST = 200
"""Bytes of a name: file systems take 255 with a suffix."""


def compile_set(
    models: Mapping[str, ModelSource],
    options: Mapping[str, Options],
    *,
    links: Mapping[str, str] | None = None,
    decisions: SetDecisions | str | Path | None = None,
) -> CompiledSet:
    """Compile several graphs; `qcompiler.compile_together` is the public face.

    Args:
        models: the graphs by name.
        options: what each is compiled with; the dump is a folder of the set, in which each graph has its own.
        links: ``consumer.input`` to ``producer.output``: feeds that come out of another graph.
        decisions: a record of an earlier build; it is repeated without timing.

    Raises:
        QCompilerError: bad input; the text names the graph.
    """
    _check_names(models)
    record = SetDecisions.read(decisions) if isinstance(decisions, str | Path) else decisions
    if record is not None and set(record.graphs) != set(models):
        raise PassError(
            f"the decisions record is of the graphs {', '.join(sorted(record.graphs))}, expected "
            f"{', '.join(sorted(models))}; give the same graphs, or compile anew"
        )
    own = {name: _own(name, options[name], record) for name in models}
    own = link_graphs(models, own, links or {})
    if any(o.target == CPU for o in own.values()):
        return _alone(models, own)
    compilations: dict[str, Compilation] = {}
    for name, source in models.items():
        with _named(name):
            compilations[name] = Compilation(source, own[name])
            compilations[name].prepare()
    shared = find_shared(compilations)
    decided: dict[str, Decided] = {}
    for name, compilation in compilations.items():
        with _named(name):
            mine = frozenset(use.group for weight in shared for use in weight.uses.get(name, ()))
            decided[name] = Decided(compilation, *compilation.decide(mine))
    if record is None and all(o.guard for o in own.values()):
        agree(decided, shared)
    finished: dict[str, CompiledModel] = {}
    for name, one in decided.items():
        with _named(name):
            finished[name] = one.compilation.finish(one.forms, one.engine_forms)
    return CompiledSet(finished, _rows(shared, decided, finished))


def _own(name: str, options: Options, record: SetDecisions | None) -> Options:
    """Return a graph's options: its part of the record, its folder of the dump, and its name before each line."""
    return replace(
        options,
        decisions=None if record is None else record.graphs[name],
        dump=None if options.dump is None else Path(options.dump) / name,
        progress=None if options.progress is None else _prefixed(options.progress, name),
    )


def _prefixed(progress: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda text: progress(f"[{name}] {text}")


def _check_names(models: Mapping[str, ModelSource]) -> None:
    if not models:
        raise ModelError("no model is given; expected at least one")
    for name in models:
        if why := _why_no_name(name):
            raise ModelError(f"{name!r} cannot be the name of a graph: {why}; files are named after it on any system")
    folded = [unicodedata.normalize("NFC", name).casefold() for name in models]
    if len(set(folded)) < len(folded):
        raise ModelError(f"two graphs have names that differ in case only: {', '.join(models)}")


def _why_no_name(name: object) -> str:
    """Return why a graph cannot have a name, or nothing if it can: it names files, and stands in ``NAME=VALUE``."""
    if not isinstance(name, str):
        return f"expected a text, found {type(name).__name__}"
    if not name:
        return "it is empty"
    if found := sorted(_FORBIDDEN & set(name)):
        return f"it holds {' '.join(found)}"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "it holds a control character"
    if name != name.strip() or name[0] == "." or name[-1] == ".":
        return "it begins or ends with a dot or a space"
    if name.partition(".")[0].rstrip().casefold() in _RESERVED:
        return "Windows reserves it for a device"
    return f"it is longer than {_LONGEST} bytes" if len(name.encode()) > _LONGEST else ""


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a graph's name in front of errors."""
    try:
        yield
    except QCompilerError as error:
        raise type(error)(f"{name}: {error}") from error


def _alone(models: Mapping[str, ModelSource], options: Mapping[str, Options]) -> CompiledSet:
    """Compile each graph by itself; what comes out the same is still stored once."""
    finished: dict[str, CompiledModel] = {}
    for name, source in models.items():
        with _named(name):
            finished[name] = compile_model(source, options[name])
    note = f"target {CPU}: each graph got the engine that is fastest for it, and its forms were decided by itself"
    return CompiledSet(finished, (), (note,))


def _rows(
    shared: tuple[SharedWeight, ...], decided: Mapping[str, Decided], finished: Mapping[str, CompiledModel]
) -> tuple[WeightRow, ...]:
    """Return how the graphs store each shared weight, and why they differ where they do."""
    plans: dict[str, QuantPlan] = {name: d.compilation.built.state.plan for name, d in decided.items()}
    reasons = {name: {g.group: g.why for g in made.report.groups} for name, made in finished.items()}
    rows = []
    for weight in shared:
        specs = specs_of(weight, plans)
        sizes = [weight.stored(spec) for spec in dict.fromkeys(specs.values())]
        differ = len(sizes) > 1
        rows.append(
            WeightRow(
                {graph: uses[0].name for graph, uses in weight.uses.items()},
                weight.nbytes,
                {graph: _text(spec) for graph, spec in specs.items()},
                sum(sizes) - min(sizes),
                {g: reasons[g].get(uses[0].group, "") for g, uses in weight.uses.items()} if differ else {},
            )
        )
    return tuple(rows)


def _text(spec: Spec) -> str:
    if spec is None:
        return "float"
    block = f", blocks of {spec.block}" if spec.block else ""
    safe = ", sums safe" if spec.pair_safe else ""
    return f"{spec.format} per {'tensor' if spec.axis is None else f'axis {spec.axis}'}{block}{safe}"


def fitting_shapes(models: Mapping[str, ModelSource], shapes: Lengths) -> dict[str, Lengths]:
    """Return, per graph, those of some shapes whose inputs it has.

    Raises:
        ModelError: an input that no graph has.
    """
    found: dict[str, Lengths] = {}
    known: set[str] = set()
    for name, source in models.items():
        with _named(name):
            inputs = {str(v.name) for v in read_model(source).graph.inputs}
        known |= inputs
        found[name] = {key: lengths for key, lengths in shapes.items() if key in inputs}
    if unknown := sorted(set(shapes) - known):
        raise ModelError(f"no graph has the input {unknown[0]!r} that a shape is given for")
    return found
