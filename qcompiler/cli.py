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
from qcompiler.cli_explain import explain_command
from qcompiler.cli_inspect import inspect_command
from qcompiler.cli_lists import passes_command, patterns_command, recipes_command, targets_command
from qcompiler.cli_lock import lock_command
from qcompiler.cli_new_pass import new_pass_command
from qcompiler.cli_opt import opt_command
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


app.command("compile")(compile_command)
app.command("calibrate")(calibrate_command)
app.command("opt")(opt_command)
app.command("inspect")(inspect_command)
app.command("explain")(explain_command)
app.command("blame")(blame_command)
app.command("diff")(diff_command)
app.command("lock")(lock_command)
app.command("check")(check_command)
app.command("bench")(bench_command)
app.command("cache")(cache_command)
app.command("targets")(targets_command)
app.command("recipes")(recipes_command)
app.command("passes")(passes_command)
app.command("patterns")(patterns_command)
app.command("new-pass")(new_pass_command)
app.command("demo")(demo_command)


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
