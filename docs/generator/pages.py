"""The reference pages that are made of the code when the site is built; none of them is committed.

They are built, not committed, so that no edit of a docstring, a table or an option asks for a second edit elsewhere; a
test makes all of them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType

import qcompiler
import qcompiler.patterns
from docs.generator.diagram import drawings
from docs.generator.examples import BeforeAfter, pass_example, rule_example
from qcompiler.errors import QCompilerError
from qcompiler.passes.catalog import DEFAULT_PIPELINE, PASSES
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.catalog import all_rules
from qcompiler.patterns.language import Rule
from qcompiler.patterns.traps import TRAP_RULES
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.registry import pass_info
from qcompiler.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]

_CONTRACTS = {
    "Exact": "the same bits",
    "Reassociates": "the same function in another order of operations, by at most this part of the largest value",
    "WithinStep": "at most this many quantization steps",
    "Lossy": "measured, not bounded",
}

_PHASES = {
    "FLOAT": "plain ONNX",
    "PLANNED": "plain ONNX, with a plan beside it",
    "QDQ": "QuantizeLinear and DequantizeLinear in the graph",
    "FUSED": "one call of a `qcompiler` function per fused group",
    "LOWERED": "only what the engine loads",
}


def all_pages() -> dict[str, str]:
    """Return every generated page, by its path below ``docs/``."""
    from docs.generator.commands import commands_page

    families = rule_families()
    made = {
        "reference/index.md": _index(),
        "reference/passes/index.md": _passes_index(),
        "reference/rules/index.md": _rules_index(families),
        "reference/recipes.md": recipes_page(),
        "reference/errors.md": errors_page(),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
        "reference/authors.md": authors_page(),
    }
    made |= {f"reference/passes/{cls.name()}.md": pass_page(cls, families) for cls in PASSES}
    made |= {f"reference/rules/{family}.md": rules_page(family, rules) for family, rules in families.items()}
    return made


def pass_names() -> list[str]:
    """Return the pages of passes in the order of a build."""
    return [cls.name() for cls in PASSES]


def rule_families() -> dict[str, list[Rule]]:
    """Return the rules by family: the module of ``qcompiler.patterns`` that holds them."""
    owner: dict[str, str] = {}
    for module in pkgutil.iter_modules(qcompiler.patterns.__path__):
        if module.name == "catalog":
            continue
        loaded = importlib.import_module(f"qcompiler.patterns.{module.name}")
        for name in _rules_in(loaded):
            owner.setdefault(name, module.name)
    families: dict[str, list[Rule]] = {}
    for rule in all_rules():
        families.setdefault(owner.get(rule.name, "others"), []).append(rule)
    return families


def _rules_in(module: ModuleType) -> Iterator[str]:
    source = inspect.getsource(module)
    for rule in all_rules():
        if f'"{rule.name}"' in source:
            yield rule.name


def _index() -> str:
    return """# Reference

Made of the code when the site is built:

- [Command line](commands.md): every command and option
- [Python](api.md): the public names of `qcompiler` and `qcompiler.ort`
- [For authors of passes](authors.md): passes, patterns, plan
- [Recipes](recipes.md) and [errors](errors.md)
- [Passes](passes/index.md): phases, contract, options, rules, and what each does to a small graph
- [Rules](rules/index.md): pattern, conditions, and a graph before and after

Written by hand, and generated in part: [targets](../targets.md).
"""


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if (text or "").strip() else ""


def _prose(text: str) -> str:
    """Turn a docstring into Markdown: its ``Options:`` section goes (a table has it), code stays code."""
    body = re.split(r"\n(?:Options|Args|Attributes|Returns|Raises|Class attributes):\n", text)[0]
    return body.replace("``", "`").strip()


def _passes_index() -> str:
    lines = [
        "# Passes", "",
        "In the order in which a build meets them. `qcompiler compile` runs", "", "```", DEFAULT_PIPELINE, "```", "",
        "When and why a pass declines is told in [another page](../../passes.md). `qcompiler passes NAME` shows the "
        "same in a terminal.", "",
        "| pass | needs | gives | contract | what it does |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for cls in PASSES:
        info = pass_info(cls)
        needs = ", ".join(p.name for p in info.needs)
        gives = info.gives.name if info.gives is not None else ""
        lines.append(f"| [{info.name}]({info.name}.md) | {needs} | {gives} | `{info.numerics}` | {_prose(info.doc)} |")
    return "\n".join(lines) + "\n"


def pass_page(cls: type[Pass], families: dict[str, list[Rule]]) -> str:
    """Return the page of a pass."""
    info = pass_info(cls)
    doc = inspect.getdoc(cls) or ""
    gives = info.gives.name if info.gives is not None else "the same phase"
    contract = type(info.numerics).__name__
    where = Path(inspect.getfile(cls)).name
    lines = [
        f"# {info.name}", "", _prose(doc), "",
        "| | |", "|---|---|",
        *(f"| needs | {p.name}: {_PHASES[p.name]} |" for p in info.needs),
        f"| gives | {gives}{': ' + _PHASES[gives] if gives in _PHASES else ''} |",
        f"| may move the numbers | `{info.numerics}`: {_CONTRACTS[contract]} |",
        f"| code | `passes/{where}` |", "",
        "Behind it the verifier checks names, order of definition, schemas, shapes, and the rules of the phase "
        f"{gives if gives in _PHASES else info.needs[0].name}.", "",
    ]  # fmt: skip
    if info.options:
        meanings = _meanings(doc)
        lines += ["## Options", "", "| option | type | default | meaning |", "|---|---|---|---|"]
        for option in info.options:
            default = f"`{option.default}`" if option.default is not None else ""
            meaning = meanings.get(option.name.replace("-", "_"), "").replace("|", "\\|")
            lines.append(f"| `{option.name}` | {option.type} | {default} | {meaning} |")
        lines.append("")
    if rules := _rules_of(cls):
        lines += ["## Rules", "", "| rule | what it does |", "|---|---|"]
        owner = {rule.name: family for family, members in families.items() for rule in members}
        for rule in rules:
            name = f"[{rule.name}](../rules/{owner[rule.name]}.md#{rule.name})" if rule.name in owner else rule.name
            lines.append(f"| {name} | {_prose(rule.doc)} |")
        lines.append("")
    example = pass_example(info.name)
    if example is None and rules:
        example = rule_example(rules[0])
    if example is not None:
        lines += ["## Example", "", *_shown(example)]
    return "\n".join(lines) + "\n"


def _rules_of(cls: type[Pass]) -> list[Rule]:
    if not issubclass(cls, RewritePass):
        return []
    rules = list(cls().rules)
    if cls.name() == "avoid-engine-traps":
        rules += [rule for members in TRAP_RULES.values() for rule in members]
    return list({rule.name: rule for rule in rules}.values())


def _meanings(doc: str) -> dict[str, str]:
    found = re.search(r"\nOptions:\n(?P<rows>(?:[ ]+.*\n?|\n)+)", doc)
    made: dict[str, str] = {}
    for row in re.finditer(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", found["rows"] if found else "", re.MULTILINE):
        made[row[1]] = " ".join(row[2].split()).replace("``", "`")
    return made


def _shown(example: BeforeAfter) -> list[str]:
    lines = [example.note, ""] if example.note else []
    if example.graphs is not None and (drawn := drawings(*example.graphs)):
        lines += [drawn, ""]
    if example.before == example.after:
        return [*lines, "```", example.after.rstrip(), "```", ""]
    return [
        *lines, "Before:", "", "```", example.before.rstrip(), "```", "",
        "After:", "", "```", example.after.rstrip(), "```", "",
    ]  # fmt: skip


def _rules_index(families: dict[str, list[Rule]]) -> str:
    lines = [
        "# Rules", "",
        "A rule looks for a pattern, asks its conditions, and puts something else in its place. The language is told "
        "in [patterns](../../patterns.md); `qcompiler patterns RULE` shows a rule in a terminal.", "",
        "| family | rules |", "|---|---|",
    ]  # fmt: skip
    for family, rules in families.items():
        links = ", ".join(f"[{r.name}]({family}.md#{r.name})" for r in rules)
        lines.append(f"| [{family}]({family}.md) | {links} |")
    return "\n".join(lines) + "\n"


def rules_page(family: str, rules: list[Rule]) -> str:
    """Return the page of a family of rules."""
    module = importlib.import_module(f"qcompiler.patterns.{family}")
    doc = _prose(inspect.getdoc(module) or "")
    lines = [f"# Rules: {family.replace('_', ' ')}", "", doc, "", f"Code: `patterns/{family}.py`.", ""]
    users: dict[str, list[str]] = {}
    for cls in PASSES:
        for rule in _rules_of(cls):
            users.setdefault(rule.name, []).append(cls.name())
    for rule in rules:
        lines += [f"## {rule.name}", "", _prose(rule.doc), "", "```", str(rule.match), "```", ""]
        if rule.where:
            lines += ["Only where: " + ", ".join(f"`{clause}`" for clause in rule.where) + ".", ""]
        if rule.keeps:
            lines += ["May be read elsewhere, too: " + ", ".join(f"`{name}`" for name in rule.keeps) + ".", ""]
        if used := users.get(rule.name):
            lines += ["Run by " + ", ".join(f"[{n}](../passes/{n}.md)" for n in used) + ".", ""]
        example = rule_example(rule)
        if example is not None:
            lines += _shown(example)
    return "\n".join(lines) + "\n"


def recipes_page() -> str:
    """Return the page of the recipes: what each sets against the defaults, and why."""
    defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    keys = _attribute_meanings(Recipe)
    lines = [
        "# Recipes", "",
        "A recipe is a `.toml` file: `--recipe NAME`, or `--recipe my.toml` for one of your own. The keys:", "",
        "| key | default | meaning |", "|---|---|---|",
        *(f"| `{k}` | `{defaults[k]}` | {keys.get(k, '')} |" for k in defaults if k not in ("name", "doc")),
        "| `[[override]]` | | rows of `match` (a glob on group names), `form`, `estimator`; later rows win |", "",
    ]  # fmt: skip
    for path in sorted((ROOT / "qcompiler" / "recipes").glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
        why = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
        rows = [line for line in text.splitlines() if line and not line.startswith(("#", "doc ="))]
        doc = str(data["doc"])
        lines += [f"## `{path.stem}`", "", doc[0].upper() + doc[1:], "", why, "", "```toml", *rows, "```", ""]
    return "\n".join(lines) + "\n"


def _attribute_meanings(cls: type) -> dict[str, str]:
    found = re.search(r"\nAttributes:\n(?P<rows>(?:[ ]+.*\n?|\n)+)", inspect.getdoc(cls) or "")
    rows = re.finditer(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", found["rows"] if found else "", re.MULTILINE)
    return {row[1]: " ".join(row[2].split()).replace("``", "`") for row in rows}


def errors_page() -> str:
    """Return the page of errors and exit codes."""
    lines = [
        "# Errors and exit codes", "",
        "Every error that a user can mend derives from `qcompiler.QCompilerError`. The command line prints it as one "
        "line on stderr; `QCOMPILER_DEBUG=1` shows the traceback.", "",
        "| code | when |", "|---|---|",
        "| 0 | done; `diff`: nothing differs; `check`: no errors; `opt --bisect`: the bound holds |",
        "| 1 | the answer is no: `diff` found a difference, `check` an error, `opt --bisect` a culprit, "
        "`blame --apply` no build within the bounds |",
        "| 2 | an error below, a file that cannot be read or written, wrong usage, out of memory, an internal error |",
        "| 130, 141 | interrupted; the reader of a pipe has left |", "",
        "| error | code | what it means | raised in |", "|---|---|---|---|",
    ]  # fmt: skip
    for cls in error_classes():
        where = ", ".join(f"`{name}`" for name in _raised_in(cls.__name__))
        name = f"qcompiler.{cls.__name__}" if cls.__name__ in qcompiler.__all__ else f"{cls.__module__}.{cls.__name__}"
        lines.append(f"| `{name}` | 2 | {_prose(inspect.getdoc(cls) or '').replace(chr(10), ' ')} | {where} |")
    return "\n".join(lines) + "\n"


def error_classes() -> list[type[QCompilerError]]:
    """Return `QCompilerError` and all that derive from it, those of `qcompiler.errors` first."""
    for path in sorted((ROOT / "qcompiler").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if re.search(r"^class \w+Error\([^)]*Error", path.read_text(encoding="utf-8"), re.MULTILINE):
            importlib.import_module(module)
    found: list[type[QCompilerError]] = [QCompilerError]
    for cls in found:
        found += [sub for sub in cls.__subclasses__() if sub.__module__.startswith("qcompiler.") and sub not in found]
    return sorted(found, key=lambda cls: (cls is not QCompilerError, cls.__module__, cls.__name__))


def _raised_in(name: str) -> list[str]:
    """Return the packages whose code raises an error."""
    found: set[str] = set()
    for folder in ("qcompiler", "passes", "patterns"):
        for path in (ROOT / folder).rglob("*.py"):
            if re.search(rf"\braise {name}\(", path.read_text(encoding="utf-8")):
                parts = path.relative_to(ROOT).parts
                found.add("/".join(parts[:2]) if parts[0] == "qcompiler" and len(parts) > 2 else parts[0])
    return sorted(found)


def api_page() -> str:
    """Return the page of the public Python names, for mkdocstrings."""
    functions = [n for n in qcompiler.__all__ if not isinstance(getattr(qcompiler, n), type)]
    classes = [n for n in qcompiler.__all__ if n not in functions and not n.endswith("Error")]
    lines = ["# Python", "", "`import qcompiler` loads no engine; each loads on first use.", "", "## Functions", ""]
    lines += [_entry(f"{getattr(qcompiler, n).__module__}.{n}") for n in functions]
    lines += ["## Classes", ""]
    lines += [_entry(f"{getattr(qcompiler, n).__module__}.{n}") for n in classes]
    lines += ["Errors: see [errors](errors.md).", "", "## qcompiler.ort", ""]
    ort = importlib.import_module("qcompiler.ort")
    lines += ["Every other name is ONNX Runtime's own; see [the drop-in](../drop-in.md).", ""]
    lines += [_entry(f"{getattr(ort, n).__module__}.{n}") for n in ort.__all__]
    return "\n".join(lines) + "\n"


_AUTHORS = (
    ("Passes", ("qcompiler.pipeline.base.Pass", "qcompiler.passes.rewrite.RewritePass",
                "qcompiler.pipeline.state.CompileState", "qcompiler.pipeline.state.Remark",
                "qcompiler.pipeline.pipeline.Pipeline")),
    ("Phases and contracts", ("qcompiler.ir.phase.Phase", "qcompiler.pipeline.contract.Exact",
                              "qcompiler.pipeline.contract.Reassociates", "qcompiler.pipeline.contract.WithinStep",
                              "qcompiler.pipeline.contract.Lossy")),
    ("Patterns", tuple(f"qcompiler.patterns.language.{n}" for n in (
        "rule", "op", "var", "const", "number", "maybe", "rest", "any_of", "opt", "repeat", "Rule", "Clause"))),
    ("The plan", ("qcompiler.quant.spec.QuantSpec", "qcompiler.quant.spec.QuantSource",
                  "qcompiler.quant.spec.QuantParams", "qcompiler.quant.plan.QuantPlan")),
)  # fmt: skip


def authors_page() -> str:
    """Return the page for authors of passes and rules, for mkdocstrings."""
    lines = ["# For authors of passes and rules", "", "How to start: [patterns](../patterns.md).", ""]
    for title, names in _AUTHORS:
        lines += [f"## {title}", "", *(_entry(name) for name in names)]
    return "\n".join(lines) + "\n"


def _entry(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    if not hasattr(importlib.import_module(module), attribute):
        raise ValueError(f"{name} does not exist")
    # passes/ and patterns/ lie beside the package, so mkdocstrings, which reads folders, knows them by these names.
    return f"::: {re.sub(r'^qcompiler[.](?=passes[.]|patterns[.])', '', name)}\n"


if __name__ == "__main__":
    sys.stdout.write(all_pages()[sys.argv[1]])
