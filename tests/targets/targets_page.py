"""The generated part of docs/targets.md: ``python -m tests.targets.targets_page`` writes it anew."""

from __future__ import annotations

from pathlib import Path

from qcompiler.targets.target import Target, load_target, target_names

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"
BEGIN, END = "<!-- tables: begin, written from the TOML files -->", "<!-- tables: end -->"


def tables() -> str:
    """Return the overview and one section per target, in Markdown."""
    targets = [load_target(name) for name in target_names()]
    lines = ["| target | processor | activations | weights | float part | schemes |", "|---|---|---|---|---|---|"]
    lines += [_overview(t) for t in targets]
    for target in targets:
        lines += ["", f"### `{target.name}`", "", target.doc, *_rows(target)]
    return "\n".join(lines)


def _overview(target: Target) -> str:
    needs = f"SM{target.sm}" if target.sm else " ".join((target.processor or "any", *target.requires))
    zero = "zero point 0" if target.symmetric else "with zero point"
    if target.signed:
        zero += f", or {target.signed} without where both signs occur"
    static = any(f != "weight-only" for row in target.rows for f in row.forms)
    activations = f"{target.activation} {zero}" if static else "float"
    bits = f", {target.weight_bits} bits" if target.weight_bits < 8 else ""
    block = f" in blocks of {target.block}" if target.block else ""
    cells = (f"`{target.name}`", needs, activations, f"{target.weight}{bits}{block}", target.float_type)
    return f"| {' | '.join(cells)} | {', '.join(target.schemes)} |"


def _rows(target: Target) -> list[str]:
    lines = ["", "| operators | forms | the engine's rule |", "|---|---|---|"]
    lines += [f"| {', '.join(row.type)} | {', '.join(row.forms)} | {row.why} |" for row in target.rows]
    for scheme in target.schemes[1:]:
        lines += ["", f"Scheme `{scheme}`: {target.with_scheme(scheme).doc}"]
    if target.unavailable:
        lines += ["", *(f"- Not `{name}`: {why}." for name, why in target.unavailable.items())]
    return lines


def with_tables(page: str) -> str:
    """Return the page with its generated part replaced.

    Raises:
        ValueError: the markers are missing.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks the markers {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
