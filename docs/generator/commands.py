"""The page of the command line, made of what Typer knows."""

from __future__ import annotations

import re
from typing import Any

import typer

from qcompiler.cli import app


def commands_page() -> str:
    """Return every command with its help, arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", *_help(group.help), ""]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| [{name}](#{name}) | {_cell(c.help.split(chr(10))[0])} |" for name, c in group.commands.items()]
    for name, command in group.commands.items():
        lines += ["", f"## {name}", "", *_command(command, name)]
    return "\n".join(lines) + "\n"


def _command(command: Any, path: str) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join(_usage(p) for p in arguments)
    lines = ["```", f"qcompiler {path} [OPTIONS] {usage}".rstrip(), "```", "", *_help(command.help), ""]
    if getattr(command, "commands", None):
        for name, inner in command.commands.items():
            lines += [f"### {path} {name}", "", *_command(inner, f"{path} {name}")]
        return lines
    lines += ["| argument or option | meaning |", "|---|---|"]
    context = command.context_class(command, info_name=path)
    for parameter in (*arguments, *options):
        names, meaning = parameter.get_help_record(context)
        lines.append(f"| `{_cell(names)}` | {_cell(meaning)} |")
    return lines


def _usage(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    name = f"{name}..." if argument.nargs != 1 else name
    return name if argument.required else f"[{name}]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _help(text: str) -> list[str]:
    r"""Return a help text as Markdown; paragraphs behind ``\b`` keep their lines."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph.startswith("\b"):
            head, _, rest = paragraph.removeprefix("\b").strip("\n").partition("\n")
            lines += [head, "", "```", *(line.removeprefix("  ") for line in rest.split("\n")), "```", ""]
        else:
            lines += [" ".join(paragraph.split()), ""]
    return lines
