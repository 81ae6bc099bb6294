"""``qcompiler new-pass``: write a pass, or a rule, with its test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_files import check_new_folder
from qcompiler.errors import PassError


def new_pass_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, like fold-scales.", show_default=False)],
    rule: Annotated[bool, typer.Option("--rule", help="Write a pattern rule instead of a pass.")] = False,
    package: Annotated[bool, typer.Option("--package", help="Write a package that offers it once installed.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")] = Path(),
) -> None:
    """Write a pass (or a rule) with its test, which passes as written; then make it yours.

    No file is overwritten.

    \b
    Examples:
      qcompiler new-pass cancel-negations
      qcompiler new-pass cancel-negations --package -o ~/src
      qcompiler new-pass neg-of-neg --rule
    """
    from qcompiler.new_pass import new_pass

    made = new_pass(name, rule=rule)
    files = made.package() if package else made.files()
    if there := [path for file in files if (path := output / file).exists()]:
        raise PassError(f"{there[0]} is there already, nothing was written; choose another name or --output")
    check_new_folder(output, "the files into")
    for file, text in files.items():
        path = output / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created, never opened: a file that appeared meanwhile stays.
        with path.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        print(f"wrote {path}")
    root = output / made.name if package else output
    test = Path("tests" if package else "") / f"test_{made.snake}.py"
    print(f"test it:  cd {root} && python -m pytest {test}")
    if package:
        shown = f"patterns {made.name}" if rule else f"passes {made.name}"
        print(f"offer it: pip install -e {root} && qcompiler {shown}")
    elif not rule:
        print(f"run it:   qcompiler opt MODEL --pass-file {output / made.snake}.py --passes {made.name} --print")
