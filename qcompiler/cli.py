"""The command line: its commands, and how their errors end."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from qcompiler import __version__
from qcompiler.cli_bench import bench_command
from qcompiler.cli_blame import blame_command
from qcompiler.cli_cache import cache_command
from qcompiler.cli_calibrate import calibrate_command
from qcompiler.cli_check import check_command
from qcompiler.cli_compile import compile_command
from qcompiler.cli_demo import demo_command
from qcompiler.cli_diff import diff_command
from qcompiler.cli_eval import eval_command
from qcompiler.cli_explain import explain_command
from qcompiler.cli_explore import explore_command
from qcompiler.cli_inspect import inspect_command
from qcompiler.cli_kernels import kernels_command
from qcompiler.cli_lists import passes_command, patterns_command, recipes_command, targets_command
from qcompiler.cli_lock import lock_command
from qcompiler.cli_new_pass import new_pass_command
from qcompiler.cli_opt import opt_command
from qcompiler.cli_profile import profile_command
from qcompiler.cli_sensitivity import sensitivity_command
from qcompiler.cli_tune import tune_app
from qcompiler.errors import QCompilerError

DEBUG = "QCOMPILER_DEBUG"
"""Environment variable that makes errors show their traceback."""


class Commands(TyperGroup):
    """The commands; every error of theirs becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command: exit code 2 on an error, 130 on an interrupt."""
        if os.environ.get(DEBUG):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader (head, less) has left: nothing is wrong, but nothing more can be said.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except QCompilerError as error:
            _say(f"error: {error}")
        except MemoryError:
            _say("error: out of memory; use fewer or smaller calibration feeds, or a larger machine")
        except OSError as error:
            _say(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        except Exception as error:
            if type(error).__module__.startswith(("typer", "click")):
                raise  # wrong usage and exits have their own way out
            _say(
                f"error: internal error: {type(error).__name__}: {error}; please report it, with the traceback that "
                f"{DEBUG}=1 shows"
            )
        raise typer.Exit(2)


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


app = typer.Typer(
    name="qcompiler",
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 120},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"qcompiler {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compile ONNX models into smaller, faster ones, never slower than float and never wrong without saying so.

    \b
    Examples:
      qcompiler demo
      qcompiler compile model.onnx -o model.int8.onnx --calibration feeds.npz
      qcompiler COMMAND --help

    Errors are one line on stderr and exit code 2; QCOMPILER_DEBUG=1 shows the traceback.
    """


app.command("compile", short_help="Compile one or several models, and prove the result.")(compile_command)
app.command("calibrate", short_help="Gather calibration statistics, once for all targets.")(calibrate_command)
app.command("opt", short_help="Run a pipeline of passes on a model.")(opt_command)
app.command("inspect", short_help="Show what every pass of a build did.")(inspect_command)
app.command("explain", short_help="Say why a node is as it is, and what would change it.")(explain_command)
app.command("blame", short_help="Rank the places where the error is born.")(blame_command)
app.command("sensitivity", short_help="Rank groups by the noise they add, form by form.")(sensitivity_command)
app.command("explore", short_help="Show what accuracy and size cost in time.")(explore_command)
app.command("diff", short_help="Compare two builds, aligned by origin.")(diff_command)
app.command("lock", short_help="Write what reproduces a build byte for byte.")(lock_command)
app.command("check", short_help="Check a quantized model against an engine's rules.")(check_command)
app.command("eval", short_help="Evaluate a compiled model: metric, outputs, layers, worst samples.")(eval_command)
app.command("profile", short_help="Show time per operator, float beside compiled.")(profile_command)
app.command("bench", short_help="Time two models in interleaved rounds.")(bench_command)
app.command("cache", short_help="Show or clear the compiled models of qcompiler.ort.")(cache_command)
app.command("targets", short_help="List the targets, or show one's table.")(targets_command)
app.command("recipes", short_help="List the recipes, or show one's settings.")(recipes_command)
app.command("passes", short_help="List the passes, or show one's options.")(passes_command)
app.command("patterns", short_help="List the rewriting rules, or show one.")(patterns_command)
app.command("kernels", short_help="Show what the shipped Triton kernels compile to.")(kernels_command)
app.add_typer(tune_app, name="tune")
app.command("new-pass", short_help="Write a pass (or a rule) with its test.")(new_pass_command)
app.command("demo", short_help="Compile the demo models of the checkout.")(demo_command)


def main() -> NoReturn:
    """Run the command line and exit; the entry point ``qcompiler``."""
    if not sys.warnoptions:
        # Warnings of libraries are for developers; what users must know is in the report.
        warnings.simplefilter("ignore")
    try:
        app()
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    sys.exit(0)
