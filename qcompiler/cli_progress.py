"""Progress on a terminal: a spinner with the current step, and a line with its time for each finished one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_STEP = re.compile(r"(?P<graph>(\[[^\]]*\] )?)(?P<step>[^\d:]*)")
"""The graph of several, and what is done to it, without figures."""


@contextmanager
def progress_lines(quiet: bool, console: Console | None = None) -> Iterator[Callable[[str], None] | None]:
    """Give what the library's ``progress=`` takes: it shows lines on stderr, or None where nobody would look.

    Args:
        quiet: show nothing.
        console: where to; stderr by default. One that is no terminal shows nothing.
    """
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Few refreshes: the thread that draws must not disturb what is being timed.
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        lines = _Lines(bar, bar.add_task("start", total=None))
        yield lines.show
        lines.finish()


@contextmanager
def progress_feeds(quiet: bool, console: Console | None = None) -> Iterator[Callable[[int, int | None], None] | None]:
    """Give what takes (feeds done, feeds in all or None): it shows a bar with rate and remaining time on stderr.

    Args:
        quiet: show nothing.
        console: where to; stderr by default. One that is no terminal shows nothing.
    """
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("calibrate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("calibrate", total=None, rate="")
        began = time.perf_counter()

        def show(done: int, total: int | None) -> None:
            seconds = time.perf_counter() - began
            bar.update(task, completed=done, total=total, rate=f"{done / max(seconds, 1e-9):.1f} feeds/s")

        yield show


class _Lines:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self.bar, self.task = bar, task
        self.step = self.text = ""
        self.began = time.perf_counter()

    def show(self, text: str) -> None:
        """Show a line; the one before is finished unless it speaks of the same step (``calibrate 2/5``)."""
        match = _STEP.match(text)
        step = match[0].strip() if match is not None else text
        if step != self.step:
            self.finish()
            self.step, self.began = step, time.perf_counter()
        self.text = text
        self.bar.update(self.task, description=escape(text))

    def finish(self) -> None:
        """Leave the finished step and its seconds on the screen."""
        if self.text:
            seconds = time.perf_counter() - self.began
            self.bar.console.print(f"{seconds:7.1f} s  {self.text}", style="dim", markup=False, highlight=False)
        self.text = ""
