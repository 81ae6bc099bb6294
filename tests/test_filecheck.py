import pytest

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from tests.filecheck import CheckError, file_check, parse_checks, run_pass_test
from tests.pipeline.sample_passes import CHAIN, REGISTRY, DropIdentity, chain_feeds, chain_state, engine

TEXT = """graph main(%x) -> (%y) {
  conv: %a = Conv(%x, const<f32 3x3 #aaaa>)
  relu: %b = Relu(%a)
  left: %c = Neg(%b)
  right: %d = Abs(%b)
  sum:   %y = Add(%c, %d)
}"""


@pytest.mark.parametrize(
    "checks",
    [
        "# CHECK: Conv(%x\n# CHECK-NEXT: Relu(%a)",
        "CHECK: Conv\n// CHECK: Add",
        "text that is no expectation\n  # CHECK: sum: %y = Add",
        "# CHECK: {{[a-z]+}}: %a = Conv(%x, const<f32 {{[0-9x]+}} #{{.*}}>)",
        "# CHECK: [[OUT:%\\w+]] = Relu\n# CHECK: Neg([[OUT]])\n# CHECK-NEXT: Abs([[OUT]])",
        "# CHECK: Relu\n# CHECK-DAG: Abs(%b)\n# CHECK-DAG: Neg(%b)\n# CHECK-NEXT: Add",
        "# CHECK-DAG: [[L:%\\w+]] = Neg\n# CHECK-DAG: [[R:%\\w+]] = Abs\n# CHECK: Add([[L]], [[R]])",
        "# CHECK: Conv\n# CHECK-NOT: Sigmoid\n# CHECK-NOT: Neg\n# CHECK: Relu",
        "# CHECK-NOT: Relu\n# CHECK: Conv\n# CHECK: Add\n# CHECK-NOT: Conv",
        "# CHECK: %[[V:a]] = Conv(%x{{.*}}\n# CHECK-NEXT: Relu(%[[V]])",
    ],
)
def test_expectations_that_are_met(checks: str) -> None:
    file_check(TEXT, checks)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ("# CHECK: Sigmoid", r"CHECK: Sigmoid \(line 1\): no line matches"),
        ("# CHECK: Add\n# CHECK: Conv", r"CHECK: Conv \(line 2\): no line matches"),
        ("# CHECK: Relu\n# CHECK: Relu", r"CHECK: Relu \(line 2\): no line matches"),
        ("# CHECK: Conv\n# CHECK-NEXT: Neg", r"CHECK-NEXT: Neg \(line 2\): the next line does not match"),
        ("# CHECK: }\n# CHECK-NEXT: Neg", r"CHECK-NEXT: Neg \(line 2\): the next line does not match"),
        ("# CHECK-NOT: Relu", r"CHECK-NOT: Relu \(line 1\): line 3 matches"),
        ("# CHECK: Conv\n# CHECK-NOT: Relu\n# CHECK: Neg", r"CHECK-NOT: Relu \(line 2\): line 3 matches"),
        ("# CHECK: Add\n# CHECK-NOT: {{^}$}}", r"CHECK-NOT: \{\{\^\}\$\}\} \(line 2\): line 7 matches"),
        ("# CHECK-DAG: Neg\n# CHECK-DAG: Neg", r"CHECK-DAG: Neg \(line 2\): no line left matches"),
        ("# CHECK: [[V:%a]] = \n# CHECK: Neg([[V]])", r"captured: V = '%a'"),
        ("# CHECK: Neg([[V]])", r"\[\[V\]\] is used before it is captured"),
        ("# CHECK: {{(}}", r"CHECK: \{\{\(\}\} \(line 1\): .*unterminated"),
        ("# CHECK-LAST: x", r"line 1: unknown expectation CHECK-LAST; known: CHECK, -NEXT, -NOT, -DAG"),
        ("# CHECK:  ", r"line 1: CHECK has no text"),
        ("nothing", r"there is no CHECK line"),
        ("# CHECK-NEXT: x", r"CHECK-NEXT: x \(line 1\) has no match in front of it"),
    ],
)
def test_expectations_that_are_not_met(checks: str, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        file_check(TEXT, checks)


def test_a_failure_shows_the_last_match_and_the_place() -> None:
    with pytest.raises(CheckError) as caught:
        file_check(TEXT, "# CHECK: Relu\n# CHECK-NEXT: Add")
    shown = str(caught.value).splitlines()
    assert "=   3   relu: %b = Relu(%a)" in shown
    assert ">   4   left: %c = Neg(%b)" in shown


def test_forbidden_text_sees_only_captures_in_front_of_it() -> None:
    file_check("a = 1\nb = 2\nuse a", "# CHECK: [[V:\\w]] = 1\n# CHECK-NOT: use [[V]]\n# CHECK: [[V:\\w]] = 2")


def test_parsed_checks_keep_kind_text_and_line() -> None:
    found = parse_checks("x\n# CHECK: one\n\n  # CHECK-NOT:  two ")
    assert [(c.kind, c.text, c.line) for c in found] == [("", "one", 2), ("NOT", "two", 4)]


# ---- run_pass_test ------------------------------------------------------------------------------------------------

EXPECTED = """
# CHECK: MatMul(%x
# CHECK-NOT: Identity
# CHECK: Mul(%a, const<f32 1.0>)
"""


def test_a_pass_test_is_text_in_and_checks_out() -> None:
    state = run_pass_test(CHAIN, "drop-identity", EXPECTED, registry=REGISTRY, engine=engine(), feeds=chain_feeds())
    assert [r.node for r in state.remarks] == ["Identity_1", "Identity_5"]
    run_pass_test("", DropIdentity(), EXPECTED, state=chain_state())


def test_a_pass_test_verifies_and_holds_to_the_contract() -> None:
    with pytest.raises(PassError, match="break-graph"):
        run_pass_test(CHAIN, "break-graph", EXPECTED, registry=REGISTRY)
    with pytest.raises(PassError, match="breaks its contract"):
        run_pass_test(
            CHAIN, "scale-factors{factor=2.0}", EXPECTED, registry=REGISTRY, engine=engine(), feeds=chain_feeds()
        )
    with pytest.raises(PassError, match="needs phase PLANNED"):
        run_pass_test(CHAIN, "insert-nothing", EXPECTED, registry=REGISTRY)
    assert run_pass_test(
        CHAIN, "insert-nothing", "# CHECK: Identity", registry=REGISTRY, phase=Phase.PLANNED
    ).phase is (Phase.QDQ)


def test_a_pass_test_fails_on_another_result() -> None:
    with pytest.raises(CheckError, match=r"CHECK-NOT: Identity \(line 1\): line 4 matches"):
        run_pass_test(CHAIN, "many", "# CHECK-NOT: Identity", registry=REGISTRY)
