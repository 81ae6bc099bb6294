"""What other packages offer: found, shown with its owner, used, recorded; and what is broken breaks nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler import plugins
from qcompiler.dropin.digests import entry_key
from qcompiler.errors import PassError, TargetError
from qcompiler.explaining.lock import LockError, compile_locked, make_lock
from qcompiler.ir.importer import import_model
from qcompiler.ir.text import parse_text
from qcompiler.observed import observed_values
from qcompiler.options import Options
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.catalog import shipped_passes
from qcompiler.passes.eliminate_identity import EliminateIdentity
from qcompiler.patterns.catalog import offered_rules
from qcompiler.pipeline.instruments.weights import versions
from qcompiler.pipeline.state import CompileState
from qcompiler.plugins import PASSES, RECIPES, RULES, TARGETS, PluginError
from qcompiler.recipes.recipe import load_recipe
from qcompiler.targets.target import known_targets, load_target, target_names
from tests.extend.conftest import Call, Installer
from tests.extend.packages import PASS, install
from tests.extend.packages import RULES as RULES_TEXT

HEAD = '<ir_version: 10, opset_import: ["" : 21]> g (float[N,8] x) => (float[N,8] y)'
NEGATED = f"{HEAD} {{ a = Neg(x) b = Neg(a) c = Abs(b) d = Abs(c) y = Relu(d) }}"

TARGET = """
[target]
extends = "ort-x86"
doc = "A chip that adds nothing."
drop = ["Add"]
"""
RECIPE = """
doc = "int8 without negations."
passes = "cancel-negations"
matmul = "static"
"""


def state_of(text: str) -> CompileState:
    return CompileState(import_model(parse_text(text)), load_target("ort-x86"))


def operators(state: CompileState) -> list[str]:
    return [n.op_type for n in state.model.graph]


@pytest.fixture
def everything(installed: Installer) -> Path:
    """Install a package that offers one thing of every kind."""
    return installed(
        "edge-tools",
        {"edge_tools/__init__.py": "", "edge_tools/passes.py": PASS, "edge_tools/rules.py": RULES_TEXT,
         "edge_tools/edge-npu.toml": TARGET, "edge_tools/edge-int8.toml": RECIPE},
        {PASSES: {"cancel-negations": "edge_tools.passes:CancelNegations"},
         RULES: {"eliminate-identity": "edge_tools.rules:TWICE_ABS"},
         TARGETS: {"edge-npu": "edge_tools"}, RECIPES: {"edge-int8": "edge_tools"}},
        "2.1",
    )  # fmt: skip


@pytest.mark.usefixtures("everything")
def test_lists_show_what_is_offered_and_whose_it_is(call: Call) -> None:
    for command, name in (
        ("passes", "cancel-negations"), ("patterns", "abs-of-abs"), ("targets", "edge-npu"), ("recipes", "edge-int8"),
    ):  # fmt: skip
        listed, shown = call(command), call(command, name)
        assert (listed.code, listed.stderr, shown.code) == (0, "", 0)
        (line,) = [line for line in listed.stdout.splitlines() if line.startswith(f"{name} ")]
        assert "edge-tools 2.1" in line
        assert "from edge-tools 2.1" in shown.stdout
    assert "rules from edge-tools 2.1: abs-of-abs" in call("passes", "eliminate-identity").stdout
    assert "from edge-tools 2.1 for eliminate-identity" in call("patterns", "abs-of-abs").stdout


def test_lists_have_no_owners_where_there_are_no_plugins(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.PLUGINS, "none")
    for command in ("passes", "patterns", "targets", "recipes"):
        assert not call(command).stdout.splitlines()[0].rstrip().endswith("from")


@pytest.mark.usefixtures("everything")
def test_a_pass_can_be_named_in_a_pipeline(call: Call, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(NEGATED), model)
    done = call("opt", model, "--passes", "cancel-negations,eliminate-identity", "--print")
    assert done.code == 0, done.stderr
    assert "Neg" not in done.stdout
    assert done.stdout.count("Abs(") == 1


@pytest.mark.usefixtures("everything")
def test_rules_are_tried_behind_those_of_the_pass() -> None:
    assert [r.name for r in offered_rules("eliminate-identity")] == ["abs-of-abs"]
    assert offered_rules("fold-casts") == ()
    state = state_of(NEGATED)
    assert EliminateIdentity().run(state) == 1
    assert operators(state) == ["Neg", "Neg", "Abs", "Relu"]
    assert ("abs-of-abs", "eliminate-identity", True) in [(r.rule, r.pass_name, r.done) for r in state.remarks]
    assert EliminateIdentity().run(state) == 0


def test_rules_for_canonicalize_run_in_every_round(installed: Installer) -> None:
    installed("abs-rules", {"abs_rules.py": RULES_TEXT}, {RULES: {"canonicalize": "abs_rules:TWICE_ABS"}})
    state = state_of(NEGATED)
    Canonicalize().run(state)
    assert operators(state).count("Abs") == 1
    assert ("abs-of-abs", "canonicalize") in [(r.rule, r.pass_name) for r in state.remarks if r.done]


@pytest.mark.usefixtures("everything")
def test_a_target_extends_a_shipped_one_and_is_calibrated_for() -> None:
    assert "edge-npu" in known_targets()
    assert "edge-npu" not in target_names()
    table, base = load_target("edge-npu"), load_target("ort-x86")
    assert table.doc == "A chip that adds nothing."
    assert base.row("Add") is not None
    assert table.row("Add") is None
    assert table.row("MatMul") == base.row("MatMul")


def test_calibration_looks_at_what_only_an_offered_target_quantizes(installed: Installer) -> None:
    model = import_model(parse_text(f"{HEAD} {{ a = Sub(x, x) y = Sinh(a) }}"))
    assert "a" not in observed_values(model)[0]
    table = '[target]\nengine = "onnxruntime"\n[[op]]\ntype = ["Sub"]\nkind = "arithmetic"\nforms = ["static"]\n'
    installed(
        "sub_chip", {"sub_chip/__init__.py": "", "sub_chip/sub-chip.toml": table}, {TARGETS: {"sub-chip": "sub_chip"}}
    )
    assert "a" in observed_values(model)[0]


def test_a_target_may_extend_an_offered_one_and_be_a_text(installed: Installer) -> None:
    text = 'TABLE = """\n[target]\nextends = "edge-npu"\ndoc = "Smaller."\ndrop = ["Conv"]\n"""\n'
    installed("first", {"first/__init__.py": "", "first/edge-npu.toml": TARGET}, {TARGETS: {"edge-npu": "first"}})
    installed("second", {"second.py": text}, {TARGETS: {"edge-npu-lite": "second:TABLE"}})
    table = load_target("edge-npu-lite")
    assert (table.row("Add"), table.row("Conv"), table.doc) == (None, None, "Smaller.")


@pytest.mark.usefixtures("everything")
def test_compile_knows_target_and_recipe_and_records_the_plugin() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 8)).astype(np.float32)
    model = onnx.parser.parse_model(f"{HEAD} <float[8,8] w = {{{','.join(map(str, weight.ravel()))}}}> "
                                    "{ a = Neg(x) b = Neg(a) y = MatMul(b, w) }")  # fmt: skip
    feeds = [{"x": np.random.default_rng(i).standard_normal((4, 8)).astype(np.float32)} for i in range(6)]
    asked = Options(target="edge-npu", recipe="edge-int8", calibration=feeds, guard=False)
    compiled = qcompiler.compile(model, target="edge-npu", recipe="edge-int8", calibration=feeds, guard=False)
    assert [n.op_type for n in compiled.model.graph if n.op_type == "Neg"] == []
    assert ("cancel-negations", 1) in compiled.report.passes
    assert compiled.decisions.context["plugins"] == "edge-tools 2.1"
    assert versions()["edge-tools"] == "2.1"
    lock = make_lock(model, asked, compiled)
    assert lock.versions["edge-tools"] == "2.1"
    assert compile_locked(model, lock, Options(calibration=feeds)).to_bytes() == compiled.to_bytes()


def test_another_plugin_version_is_another_build(installed: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.parser.parse_model(f"{HEAD} {{ y = Relu(x) }}")
    plain = qcompiler.compile(model, target="ort-x86", guard=False)
    lock = make_lock(model, Options(target="ort-x86", guard=False), plain)
    keys = [entry_key("m", {})]
    site = installed("abs-rules", {"abs_rules.py": RULES_TEXT}, {RULES: {"canonicalize": "abs_rules:TWICE_ABS"}})
    keys.append(entry_key("m", {}))
    with pytest.raises(LockError, match=r"abs-rules is 1.0, locked without"):
        compile_locked(model, lock)
    again = qcompiler.compile(model, target="ort-x86", guard=False, decisions=plain.decisions)
    assert [w for w in again.report.warnings if "made with the plugins none, there are abs-rules 1.0 now" in w]
    newer = install(site.parent / "newer", "abs-rules", {"abs_rules.py": RULES_TEXT},
                    {RULES: {"canonicalize": "abs_rules:TWICE_ABS"}}, "1.1")  # fmt: skip
    monkeypatch.syspath_prepend(str(newer))
    keys.append(entry_key("m", {}))
    assert plugins.plugin_versions() == {"abs-rules": "1.1"}
    monkeypatch.setenv(plugins.PLUGINS, "none")
    assert plugins.plugin_versions() == {}
    assert entry_key("m", {}) == keys[0]
    assert len(set(keys)) == 3


BROKEN = {
    "import error": (
        "no_such_module:Thing",
        r"cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "wrong type": ("math:pi", "is not a pass class: expected one derived from qcompiler.pipeline.base.Pass"),
    "other name": ("broken_names:CancelNegations", "offers the pass cancel-negations: the two names must be the same"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pass_breaks_only_what_names_it(case: str, installed: Installer, call: Call, tmp_path: Path) -> None:
    value, reason = BROKEN[case]
    installed("broken-things", {"broken_names.py": PASS}, {PASSES: {"broken-pass": value}})
    registry = shipped_passes().with_entry_points()
    with pytest.raises(PluginError, match=reason) as caught:
        registry.get("broken-pass")
    text = str(caught.value)
    assert text.startswith("entry point broken-pass of broken-things 1.0 (qcompiler.passes = ")
    assert text.endswith("uninstall broken-things, or go on without other packages: QCOMPILER_PLUGINS=none")
    listed = call("passes")
    assert listed.code == 0
    assert f"warning: {text}" in listed.stderr
    assert [n for n in shipped_passes().names() if n not in listed.stdout] == []
    model = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(NEGATED), model)
    assert call("opt", model, "--passes", "canonicalize").code == 0
    used = call("opt", model, "--passes", "broken-pass")
    assert (used.code, used.stderr) == (2, f"error: {text}\n")


def test_what_is_shipped_keeps_its_name(installed: Installer, call: Call) -> None:
    table = TARGET.replace("A chip", "A squatter")
    installed(
        "squatter",
        {"squat/__init__.py": "", "squat/passes.py": PASS, "squat/ort-x86.toml": table, "squat/int8.toml": RECIPE,
         "squat/host.toml": table},
        {PASSES: {"fold-casts": "squat.passes:CancelNegations"}, TARGETS: {"ort-x86": "squat", "host": "squat"},
         RECIPES: {"int8": "squat"}},
    )  # fmt: skip
    assert load_target("ort-x86").row("Add") is not None
    assert load_recipe("int8").passes == ""
    assert shipped_passes().with_entry_points().get("fold-casts").__module__ == "qcompiler.passes.fold_casts"
    for command, names in (("passes", ["fold-casts"]), ("targets", ["host", "ort-x86"]), ("recipes", ["int8"])):
        done = call(command)
        assert done.code == 0
        told = [line for line in done.stderr.splitlines() if "has a name that qcompiler itself has already" in line]
        assert [line.split()[3] for line in told] == names


def test_two_packages_with_one_name_are_both_named(installed: Installer, call: Call) -> None:
    for number in ("one", "two"):
        installed(f"pack-{number}", {f"pack_{number}.py": PASS},
                  {PASSES: {"cancel-negations": f"pack_{number}:CancelNegations"}})  # fmt: skip
    done = call("passes", "cancel-negations")
    assert done.code == 2
    assert "cancel-negations of pack-two 1.0" in done.stderr
    assert "has a name that pack-one 1.0 has already" in done.stderr
    assert call("passes").stderr.count("has already") == 1


def test_one_distribution_can_be_chosen(installed: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("one", "two"):
        installed(f"pack_{number}", {f"pack_{number}.py": PASS},
                  {PASSES: {"cancel-negations": f"pack_{number}:CancelNegations"}})  # fmt: skip
    monkeypatch.setenv(plugins.PLUGINS, "Pack.Two")
    registry = shipped_passes().with_entry_points()
    assert registry.owner("cancel-negations") == "pack_two 1.0"
    assert registry.get("cancel-negations").__module__ == "pack_two"


@pytest.mark.parametrize(
    ("value", "text", "reason"),
    [
        ("nowhere", "", "cannot be loaded: ModuleNotFoundError"),
        ("chip", "", "has no bad-chip.toml in the package chip"),
        ("math:pi", "", "is a float: expected a package with bad-chip.toml in it, or a text"),
        ("chip:TEXT", 'TEXT = "[target]"', "is no capability table: target bad-chip: .* lacks 'engine'"),
        (
            "chip:TEXT",
            """TEXT = '[target]\\nextends = "no-chip"'""",
            "is no capability table: .* extends unknown 'no-chip'",
        ),
    ],
)
def test_a_broken_target_breaks_only_what_names_it(
    value: str, text: str, reason: str, installed: Installer, call: Call
) -> None:
    installed("bad-chips", {"chip/__init__.py": text}, {TARGETS: {"bad-chip": value}})
    with pytest.raises(PluginError, match=f"entry point bad-chip of bad-chips 1.0 .* {reason}"):
        load_target("bad-chip")
    listed = call("targets")
    assert listed.code == 0
    assert "bad-chip of bad-chips 1.0" in listed.stderr
    assert "ort-x86" in listed.stdout
    model = import_model(parse_text(f"{HEAD} {{ y = Relu(x) }}"))
    assert observed_values(model)[0] is not None
    with pytest.raises(TargetError, match=r"unknown target 'no-chip'; known: cpu, host, .*bad-chip"):
        load_target("no-chip")


def test_broken_rules_break_only_builds_that_try_them(installed: Installer, call: Call) -> None:
    installed(
        "bad-rules",
        {"bad_rules.py": RULES_TEXT + "\nTAKEN = rule('neutral-operand', match=op('Abs', var('x')), build=print)\n"},
        {RULES: {"fold-casts": "bad_rules:NONE", "fuse-pad": "math:pi", "fold-shapes": "bad_rules:TAKEN",
                 "no-such-pass": "bad_rules:TWICE_ABS"}},
    )  # fmt: skip
    assert EliminateIdentity().run(state_of(NEGATED)) == 0
    for name, reason in (
        ("fold-casts", "cannot be loaded: AttributeError"),
        ("fuse-pad", "holds a float: expected a rule, or a sequence of rules"),
        ("fold-shapes", "holds the rule neutral-operand, a name that qcompiler itself has already; rename it"),
    ):
        with pytest.raises(PluginError, match=f"entry point {name} of bad-rules 1.0 .* {reason}"):
            offered_rules(name)
    listed = call("patterns")
    assert listed.code == 0
    assert listed.stderr.count("warning: entry point") == 4
    assert "no-such-pass of bad-rules 1.0" in listed.stderr
    assert "is for no pass that tries rules" in listed.stderr


def test_a_broken_recipe_names_its_package(installed: Installer, call: Call) -> None:
    installed("bad-food", {"food/__init__.py": "", "food/cake.toml": "sugar = 3"}, {RECIPES: {"cake": "food"}})
    with pytest.raises(PluginError, match=r"entry point cake of bad-food 1.0 .* is no recipe: .*unknown key 'sugar'"):
        load_recipe("cake")
    assert "cake of bad-food 1.0" in call("recipes").stderr
    with pytest.raises(PassError, match=r"unknown recipe 'pie'; known: .*int8.*cake"):
        load_recipe("pie")


DAMAGED = {
    "malformed line": (b"[console_scripts]\nno equals sign here\n", "Error: "),
    "not UTF-8": (b"[qcompiler.passes]\na = m:\xff\n", "UnicodeDecodeError: "),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_metadata_that_cannot_be_read_breaks_nothing_and_is_named(
    case: str, installed: Installer, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, reason = DAMAGED[case]
    site = installed("some-tool", {}, {}, "0.9")
    (site / "some_tool-0.9.dist-info" / "entry_points.txt").write_bytes(content)
    installed("abs-rules", {"abs_rules.py": RULES_TEXT}, {RULES: {"canonicalize": "abs_rules:TWICE_ABS"}})
    assert plugins.plugin_versions() == {"abs-rules": "1.0"}
    for command in ("passes", "patterns", "targets", "recipes"):
        listed = call(command)
        assert listed.code == 0
        assert listed.stderr.count("warning: the entry points of some_tool cannot be read: ") == 1
        assert reason in listed.stderr
        assert listed.stderr.endswith("uninstall some_tool, or go on without other packages: QCOMPILER_PLUGINS=none\n")
    for wanted in ("none", "abs-rules"):
        monkeypatch.setenv(plugins.PLUGINS, wanted)
        assert (call("passes").code, call("passes").stderr) == (0, "")
    monkeypatch.setenv(plugins.PLUGINS, "some-tool")
    with pytest.raises(PluginError, match="the entry points of some_tool cannot be read"):
        plugins.offers(PASSES)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_new_process_works_beside_metadata_that_cannot_be_read(case: str, installed: Installer) -> None:
    site = installed("some-tool", {}, {}, "0.9")
    (site / "some_tool-0.9.dist-info" / "entry_points.txt").write_bytes(DAMAGED[case][0])
    onnx.save(onnx.parser.parse_model(f"{HEAD} {{ y = Relu(x) }}"), site / "m.onnx")
    code = "import sys; from qcompiler.cli import main; sys.exit(main())"
    compiling = ("compile", "m.onnx", "-o", "out.onnx", "--target", "ort-x86", "--no-guard", "--quiet")
    for arguments, wanted in ((("passes",), "none"), (compiling, "none"), (compiling, "")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=site,
            env={**os.environ, "PYTHONPATH": str(site), plugins.PLUGINS: wanted},
        )  # fmt: skip
        assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr


def test_none_reads_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("nothing needs to be read")

    monkeypatch.setattr("importlib.metadata.distributions", refuse)
    monkeypatch.setenv(plugins.PLUGINS, " None ")
    assert [plugins.offers(group) for group in plugins.GROUPS] == [()] * 4
    assert plugins.unreadable() == ()


def test_entry_points_without_metadata_have_the_name_of_their_folder(installed: Installer) -> None:
    site = installed("edge-tools", {}, {PASSES: {"cancel-negations": "edge_tools:CancelNegations"}})
    (site / "edge_tools-1.0.dist-info" / "METADATA").unlink()
    assert shipped_passes().with_entry_points().owner("cancel-negations") == "edge_tools 1.0"
    (site / "edge_tools-1.0.dist-info").rename(site / "edge_tools.egg-info")
    assert shipped_passes().with_entry_points().owner("cancel-negations") == "edge_tools"


def test_entry_points_that_are_edited_in_place_are_seen(installed: Installer) -> None:
    site = installed("edge-tools", {}, {PASSES: {"one": "edge_tools:One"}})
    points = site / "edge_tools-1.0.dist-info" / "entry_points.txt"
    assert [o.name for o in plugins.offers(PASSES)] == ["one"]
    points.write_text("[qcompiler.passes]\ntwo = edge_tools:Two\n")
    os.utime(points, ns=(1, 10**18))  # a clock may be too coarse for two edits of one test
    assert [o.name for o in plugins.offers(PASSES)] == ["two"]
    points.unlink()
    assert plugins.offers(PASSES) == ()
    points.write_text("[qcompiler.passes]\nthree = edge_tools:Three\n")
    assert [o.name for o in plugins.offers(PASSES)] == ["three"]


@pytest.mark.usefixtures("everything")
def test_a_distribution_that_is_not_there_cannot_be_chosen(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.PLUGINS, "edge-tools,edge-tolls")
    done = call("passes")
    assert done.code == 2
    assert done.stderr.startswith("error: QCOMPILER_PLUGINS names 'edge-tolls', which is not installed; ")
    assert "edge-tools" in done.stderr.partition(";")[2]
    monkeypatch.setenv(plugins.PLUGINS, "numpy")
    assert plugins.plugin_versions() == {}  # it is there, and offers nothing


def test_a_recipe_that_names_a_pass_of_a_later_phase_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "late.toml"
    recipe.write_text('passes = "fuse-qdq"\n')
    model = onnx.parser.parse_model(f"{HEAD} {{ y = Relu(x) }}")
    with pytest.raises(PassError, match=r"recipe late: pass fuse-qdq needs phase QDQ and gives FUSED; a recipe's"):
        qcompiler.compile(model, target="ort-x86", recipe=str(recipe), guard=False)


def test_installed_by_pip_and_used_from_another_process(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "edge_tools").mkdir(parents=True)
    (source / "edge_tools" / "__init__.py").write_text("")
    (source / "edge_tools" / "passes.py").write_text(PASS)
    (source / "edge_tools" / "edge-npu.toml").write_text(TARGET)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "edge-tools"\nversion = "3.0"\n'
        '[project.entry-points."qcompiler.passes"]\ncancel-negations = "edge_tools.passes:CancelNegations"\n'
        '[project.entry-points."qcompiler.targets"]\nedge-npu = "edge_tools"\n'
        '[tool.setuptools]\npackages = ["edge_tools"]\n[tool.setuptools.package-data]\nedge_tools = ["*.toml"]\n'
    )
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot build here: {done.stderr.strip().splitlines()[-1]}")
    code = (
        "import json, sys, qcompiler\n"
        "assert 'qcompiler.plugins' not in sys.modules\n"
        "from qcompiler.passes.catalog import shipped_passes\n"
        "from qcompiler.targets.target import load_target\n"
        "from qcompiler.plugins import plugin_versions\n"
        "registry = shipped_passes().with_entry_points()\n"
        "loaded = 'edge_tools' in sys.modules\n"
        "print(json.dumps([registry.owner('cancel-negations'), loaded, registry.get('cancel-negations').__module__,\n"
        "                  load_target('edge-npu').doc, plugin_versions()]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": str(site)})  # fmt: skip
    assert json.loads(run.stdout) == [
        "edge-tools 3.0", False, "edge_tools.passes", "A chip that adds nothing.", {"edge-tools": "3.0"},
    ]  # fmt: skip


def test_importing_the_package_reads_no_entry_points() -> None:
    code = "import sys, qcompiler; print('qcompiler.plugins' in sys.modules, 'onnx_ir' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
