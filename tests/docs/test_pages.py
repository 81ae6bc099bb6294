"""The generated pages: every pass, rule, recipe, command and error has its place, and examples do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qcompiler
from docs.generator.commands import commands_page
from docs.generator.diagram import drawings
from docs.generator.examples import FOLDER, pass_example, rule_example
from docs.generator.links import OUTSIDE, on_site
from docs.generator.pages import all_pages, error_classes, rule_families
from qcompiler.passes.catalog import PASSES
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.catalog import all_rules
from qcompiler.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
RULES = {rule.name: rule for rule in all_rules()}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return all_pages()


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_has_an_example_on_which_it_fires(name: str) -> None:
    example = rule_example(RULES[name])
    assert example is not None, f"write {FOLDER.relative_to(ROOT)}/rules/{name}.txt, a model on which the rule fires"
    assert example.before != example.after


def test_no_example_is_left_of_a_rule_or_pass_that_is_gone() -> None:
    assert {p.stem for p in (FOLDER / "rules").glob("*.txt")} == set(RULES)
    assert {p.stem for p in (FOLDER / "passes").glob("*.txt")} - {"chain"} <= {cls.name() for cls in PASSES}


def test_the_example_of_a_rule_is_that_of_its_page(pages: dict[str, str]) -> None:
    page = pages["reference/rules/norms.md"]
    section = page.partition("## layer-norm-affine\n")[2].partition("\n## ")[0]
    assert "Mul|Add(norm=LayerNormalization(x, s, [o]), const c)" in section
    before, _, after = section.partition("After:")
    assert "Mul(" in before.partition("Before:")[2]
    assert "Mul(" not in after
    assert "LayerNormalization(%x, const<f32 3 [2.0, 4.0, 12.0]>" in after


def test_every_rule_is_on_one_page_with_its_pass(pages: dict[str, str]) -> None:
    families = rule_families()
    assert sorted(r.name for rules in families.values() for r in rules) == sorted(RULES)
    assert "others" not in families
    assert "Run by [fuse-qdq](../passes/fuse-qdq.md)." in pages["reference/rules/qdq.md"]


def test_every_pass_has_a_page_with_phases_contract_options_and_rules(pages: dict[str, str]) -> None:
    for cls in PASSES:
        page = pages[f"reference/passes/{cls.name()}.md"]
        assert f"# {cls.name()}\n" in page
        assert "| needs | " in page
        assert f"`{cls.numerics}`" in page
        if issubclass(cls, RewritePass):
            for rule in cls().rules:
                assert f"#{rule.name})" in page or f"| {rule.name} |" in page
    plan = pages["reference/passes/plan-quantization.md"]
    assert "| `matmul` | text | `dynamic` | form of MatMul and Gemm with constant weights" in plan
    assert "needs | FLOAT: plain ONNX" in plan


@pytest.mark.parametrize(
    ("name", "gone", "made"),
    [
        ("fold-constants", "Mul(", "const<f32 6.0>"),
        ("insert-qdq", "Relu(", "QuantizeLinear("),
        ("fuse-qdq", "product/DequantizeLinear: ", "qcompiler::QMatMul"),
        ("lower-tensorrt", "qcompiler::", "conv/QuantizeLinear: "),
    ],
)
def test_a_pass_shows_what_it_does(name: str, gone: str, made: str) -> None:
    example = pass_example(name)
    assert example is not None
    assert (gone in example.before, gone in example.after) == (True, False)
    assert (made in example.before, made in example.after) == (False, True)


def test_a_drawing_frames_what_vanishes_and_what_is_new() -> None:
    example = rule_example(RULES["clip-short-form"])
    assert example is not None
    assert example.graphs is not None
    drawn = drawings(*example.graphs)
    assert drawn.count("<svg ") == 2
    assert drawn.count('"node gone"') == 1
    assert drawn.count('"node new"') == 1
    assert ">Relu</text>" in drawn.partition("after")[2]


def test_every_recipe_and_every_key_is_told(pages: dict[str, str]) -> None:
    page = pages["reference/recipes.md"]
    for path in (ROOT / "qcompiler" / "recipes").glob("*.toml"):
        assert f"## `{path.stem}`" in page
    for key in Recipe.__dataclass_fields__:
        assert key in ("name", "doc", "overrides") or f"| `{key}` |" in page
    assert "| `min_sqnr` | `18.0` | least SQNR per output in dB" in page


def test_every_error_is_told_with_its_exit_code(pages: dict[str, str]) -> None:
    page = pages["reference/errors.md"]
    assert {"ModelError", "LockError", "DumpError", "ExplainError"} <= {cls.__name__ for cls in error_classes()}
    for cls in error_classes():
        assert re.search(rf"\| `qcompiler[\w.]*\.{cls.__name__}` \| 2 \|", page)
    row = next(line for line in page.splitlines() if "CalibrationError" in line)
    assert "`qcompiler/calibration`" in row


def test_every_command_and_option_is_told() -> None:
    page = commands_page()
    assert page.count("\n## ") == page.count("| [")
    assert "`--recipe" in page
    assert "qcompiler compile model.onnx -o model.int8.onnx --calibration feeds.npz" in page
    assert "\b" not in page


def test_every_public_name_is_in_the_reference(pages: dict[str, str]) -> None:
    for name in qcompiler.__all__:
        where = "errors" if name.endswith("Error") else "api"
        assert re.search(rf"\b{name}\b", pages[f"reference/{where}.md"])


def test_links_lead_to_the_places_on_the_site() -> None:
    text = (
        "[a](../CONTRIBUTING.md#tests) [b](../LICENSE) [c](guards.md) ![d](images/x.svg)\n```\n[e](../LICENSE)\n```\n"
    )
    assert on_site(text, "patterns.md") == (
        "[a](project/contributing.md#tests) b [c](guards.md) ![d](images/x.svg)\n```\n[e](../LICENSE)\n```\n"
    )
    assert on_site("[x](docs/guards.md) [y](#limits)", "index.md") == "[x](guards.md) [y](#limits)"
    assert all((ROOT / path).exists() for path in OUTSIDE)


def test_relative_links_of_the_pages_exist_in_the_repository() -> None:
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for to in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / to).exists(), f"{page.relative_to(ROOT)}: {to}"


def test_the_navigation_has_every_page_and_no_other() -> None:
    listed = set(re.findall(r"([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    written = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    generated = {p for p in all_pages() if p.count("/") == 1}
    assert listed == written | generated | set(OUTSIDE.values())
