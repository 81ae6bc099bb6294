"""Configurations of a kernel: tile sizes, warps and stages by architecture and shape, from tables in JSON.

A table is ``kernels/NAME/configs.json``::

    {"kernel": "int8_matmul", "entries": [
      {"arch": "sm90", "when": {"M": [65, null]}, "multiple": {"K": 16}, "options": {"w_layout": ["nk"]},
       "tile": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, "warps": 8, "stages": 3,
       "instruction": "IGMMA", "triton": "3.6.0", "device": null, "microseconds": null}]}

The first entry of the architecture whose ``when`` (least and greatest length of an axis, both included, null for any),
``multiple`` (what the length is a multiple of) and ``options`` hold is taken; the last entry of each architecture has
none of them, so that there always is one; ragged calls, which load byte by byte, mostly end there. A user's
table of the same form, written by tuning, goes in front. Measured entries carry the device and the microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qcompiler.errors import TargetError

ARCHS = ("sm80", "sm89", "sm90", "sm100")
"""Architectures with tables of their own; others use that of the greatest one not above them."""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs.

    Attributes:
        tile: constants of the kernel by name, such as ``BLOCK_M``, in order of name.
        warps: warps per program.
        stages: depth of the software pipeline of loads.
    """

    tile: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    def __getitem__(self, name: str) -> int:
        """Return a constant by its name."""
        return dict(self.tile)[name]

    def __str__(self) -> str:
        """Return such as ``128x128x64 w8 s3``: the tile's numbers in order of name."""
        return "x".join(str(n) for _, n in self.tile) + f" w{self.warps} s{self.stages}"


def config(tile: Mapping[str, int], warps: int = 4, stages: int = 2) -> Config:
    """Make a configuration from a mapping of constants."""
    return Config(tuple(sorted(tile.items())), warps, stages)


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        arch: such as ``sm90``.
        config: what it chooses.
        when: least and greatest length (None: any) by axis.
        multiple: what the length of an axis must be a multiple of.
        options: legal values by option; other options are free.
        instruction: matrix instruction that must appear in the compiled code, empty for none.
        triton: version that the entry was compiled with.
        device: where it was timed, None if nowhere.
        microseconds: the time, None if not measured.
    """

    arch: str
    config: Config
    when: tuple[tuple[str, tuple[int | None, int | None]], ...] = ()
    multiple: tuple[tuple[str, int], ...] = ()
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    instruction: str = ""
    triton: str = ""
    device: str | None = None
    microseconds: float | None = None

    def holds(self, dims: Mapping[str, int], options: Mapping[str, str]) -> bool:
        """Return whether the entry is for a call of these dims and options."""
        for name, (least, most) in self.when:
            if (least is not None and dims[name] < least) or (most is not None and dims[name] > most):
                return False
        if any(dims[name] % factor for name, factor in self.multiple):
            return False
        return all(options[name] in values for name, values in self.options)

    def stale(self, triton: str) -> bool:
        """Return whether it was made with another minor version of Triton than this one: it is used all the same."""
        return self.triton.split(".")[:2] != triton.split(".")[:2]


@dataclass(frozen=True)
class Table:
    """The entries of one kernel, the preferred ones first."""

    kernel: str
    entries: tuple[Entry, ...]

    def of(self, arch: str) -> tuple[Entry, ...]:
        """Return the entries for an architecture, which may be one without a table of its own."""
        known = table_arch(arch, {e.arch for e in self.entries})
        return tuple(e for e in self.entries if e.arch in (known, arch))

    def choose(self, arch: str, dims: Mapping[str, int], options: Mapping[str, str]) -> Config:
        """Return the configuration for a call.

        Raises:
            TargetError: the kernel has none for the architecture.
        """
        return self.entry(arch, dims, options).config

    def entry(self, arch: str, dims: Mapping[str, int], options: Mapping[str, str]) -> Entry:
        """Return the row that `choose` takes.

        Raises:
            TargetError: the kernel has none for the architecture.
        """
        for entry in self.of(arch):
            if entry.holds(dims, options):
                return entry
        raise TargetError(f"{self.kernel} has no configuration for {arch} with {dict(dims)} and {dict(options)}")

    def preferring(self, entries: Iterable[Entry]) -> Table:
        """Return a table with these entries in front (a user's measured ones)."""
        return Table(self.kernel, (*entries, *self.entries))


def arch_number(arch: str) -> int:
    """Return 90 for ``sm90``.

    Raises:
        TargetError: not of that form.
    """
    if not (arch.startswith("sm") and arch[2:].isdigit()):
        raise TargetError(f"unknown architecture {arch!r}; expected one such as {', '.join(ARCHS)}")
    return int(arch[2:])


def table_arch(arch: str, known: Iterable[str]) -> str:
    """Return the greatest known architecture that is not above ``arch``.

    Consumer parts from sm120 on have neither wgmma nor tcgen05, and 99 KB of shared memory: they use the table of sm89.

    Raises:
        TargetError: all known ones are above it.
    """
    wanted = arch_number(arch)
    if wanted >= 120:
        wanted = 89
    below = [a for a in known if arch_number(a) <= wanted]
    if not below:
        raise TargetError(f"no configuration for {arch}; expected at least {min(known, key=arch_number)}")
    return max(below, key=arch_number)


def user_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder of the user's tables: ``QCOMPILER_KERNEL_CONFIGS``, else one in the user's cache folder."""
    known = os.environ if environment is None else environment
    if known.get("QCOMPILER_KERNEL_CONFIGS"):
        return Path(known["QCOMPILER_KERNEL_CONFIGS"]).expanduser()
    base = known.get("QCOMPILER_CACHE")
    if base:
        return Path(base).expanduser() / "kernels"
    return Path(known.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler" / "kernels"


def load_table(kernel: str, user: Path | None = None) -> Table:
    """Read the shipped table of a kernel, with a user's one in front if the file is there.

    Args:
        kernel: folder of the kernel.
        user: a folder with files ``KERNEL.json`` of the same form.

    Raises:
        TargetError: a table is malformed.
    """
    shipped = resources.files("qcompiler.kernels").joinpath(kernel, "configs.json").read_text(encoding="utf-8")
    table = parse_table(shipped, kernel)
    path = None if user is None else user / f"{kernel}.json"
    if path is None or not path.is_file():
        return table
    return table.preferring(parse_table(path.read_text(encoding="utf-8"), str(path)).entries)


def parse_table(text: str, source: str) -> Table:
    """Parse a table; ``source`` names it in errors.

    Raises:
        TargetError: no JSON, or a key is missing or of a wrong type.
    """
    try:
        found = json.loads(text)
        return Table(found["kernel"], tuple(_entry(e) for e in found["entries"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TargetError(f"configurations of {source} are malformed: {error!r}") from error


def _entry(found: dict[str, Any]) -> Entry:
    return Entry(
        arch=found["arch"],
        config=config({k: int(v) for k, v in found["tile"].items()}, int(found["warps"]), int(found["stages"])),
        when=tuple((name, (least, most)) for name, (least, most) in found.get("when", {}).items()),
        multiple=tuple(found.get("multiple", {}).items()),
        options=tuple((name, tuple(values)) for name, values in found.get("options", {}).items()),
        instruction=found.get("instruction", ""),
        triton=found["triton"],
        device=found["device"],
        microseconds=found["microseconds"],
    )


def dump_table(table: Table) -> str:
    """Return a table as the text that `parse_table` reads, one entry per line."""
    lines = []
    for e in table.entries:
        row: dict[str, Any] = {"arch": e.arch}
        if e.when:
            row["when"] = {name: list(bounds) for name, bounds in e.when}
        if e.multiple:
            row["multiple"] = dict(e.multiple)
        if e.options:
            row["options"] = {name: list(values) for name, values in e.options}
        row |= {"tile": dict(e.config.tile), "warps": e.config.warps, "stages": e.config.stages}
        row |= {"instruction": e.instruction, "triton": e.triton, "device": e.device, "microseconds": e.microseconds}
        lines.append("    " + json.dumps(row))
    return f'{{\n  "kernel": "{table.kernel}",\n  "entries": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
