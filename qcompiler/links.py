"""Feeds that come out of another graph: a decoder is calibrated on what the encoder's float model gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.best_engine import CPU
from qcompiler.calibration.feed_source import Spool
from qcompiler.calibration.readers import FeedSource, as_feed_source
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Statistics
from qcompiler.dataset import read_statistics
from qcompiler.engine import EngineOptions, Feeds, Runner, TensorInfo
from qcompiler.errors import CalibrationError, ModelError, QCompilerError
from qcompiler.ir.importer import import_model
from qcompiler.options import ModelSource, Options, settle
from qcompiler.runnable import load_runnable
from qcompiler.targets.target import Target


@dataclass(frozen=True)
class Link:
    """One input of a graph that is an output of another: ``consumer.input`` takes ``producer.output``."""

    consumer: str
    input: str
    producer: str
    output: str


@dataclass(frozen=True)
class _Linked:
    """One graph as far as links go: its float model, loaded."""

    runner: Runner
    options: Options


def parse_link(text: str, names: Sequence[str]) -> tuple[str, str]:
    """Read ``CONSUMER.INPUT=PRODUCER.OUTPUT`` into (consumer's end, producer's end).

    Raises:
        CalibrationError: a text of another form, or a graph that is not among ``names``.
    """
    taker, equals, giver = (part.strip() for part in text.partition("="))
    if not equals or not taker or not giver:
        raise CalibrationError(f"cannot read the link {text!r}; expected CONSUMER.INPUT=PRODUCER.OUTPUT")
    _end(taker, names)
    _end(giver, names)
    return taker, giver


def resolve_links(links: Mapping[str, str], runners: Mapping[str, Runner]) -> tuple[Link, ...]:
    """Return links by exact names; ``*`` stands for any text, the same at both ends.

    Args:
        links: ``consumer.input`` to ``producer.output``; a graph's name may hold dots.
        runners: the float models by name.

    Raises:
        CalibrationError: no such graph, input or output; types or shapes that do not fit; an input with two links; a
            graph that would be fed by itself.
    """
    found: dict[tuple[str, str], Link] = {}
    for taker, giver in links.items():
        consumer, wanted = _end(taker, list(runners))
        producer, given = _end(giver, list(runners))
        text = f"{taker}={giver}"
        matched = list(_matches(wanted, given, runners[consumer]))
        if not matched:
            known = ", ".join(i.name for i in runners[consumer].inputs)
            raise CalibrationError(f"link {text}: {consumer} has no input {wanted!r}; its inputs are: {known}")
        for name, output in matched:
            _check_fit(text, (consumer, _info(runners[consumer].inputs, name)), (producer, output), runners[producer])
            if (consumer, name) in found:
                raise CalibrationError(f"link {text}: {consumer}.{name} has a link already")
            found[consumer, name] = Link(consumer, name, producer, output)
    made = tuple(found.values())
    _check_cycles(made)
    return made


def _end(text: str, names: Sequence[str]) -> tuple[str, str]:
    """Split ``graph.tensor``; of graphs whose names begin alike the longest counts."""
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(f"{name}.") and len(text) > len(name) + 1:
            return name, text[len(name) + 1 :]
    raise CalibrationError(
        f"link: {text!r} names no graph of this build; expected GRAPH.TENSOR, and the graphs are: {', '.join(names)}"
    )


def _matches(wanted: str, given: str, runner: Runner) -> Iterator[tuple[str, str]]:
    """Yield (input, output) of a link: what ``*`` stands for in the input's name is put into the output's."""
    pattern = re.compile("(.*)".join(re.escape(part) for part in wanted.split("*")))
    for info in runner.inputs:
        if (match := pattern.fullmatch(info.name)) is not None:
            texts = iter(match.groups())
            yield info.name, re.sub(r"\*", lambda _, texts=texts: next(texts, "*"), given)  # type: ignore[misc]  # bound early


def _info(infos: Sequence[TensorInfo], name: str) -> TensorInfo:
    return next(i for i in infos if i.name == name)


def _check_fit(text: str, taker: tuple[str, TensorInfo], giver: tuple[str, str], runner: Runner) -> None:
    (consumer, wanted), (producer, output) = taker, giver
    outputs = {o.name: o for o in runner.outputs}
    if output not in outputs:
        raise CalibrationError(
            f"link {text}: {producer} has no output {output!r}; its outputs are: {', '.join(outputs)}"
        )
    given = outputs[output]
    fits = wanted.shape is None or given.shape is None or (
        len(wanted.shape) == len(given.shape)
        and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for a, b in zip(wanted.shape, given.shape, strict=True)
        )
    )  # fmt: skip
    if wanted.dtype != given.dtype or not fits:
        raise CalibrationError(
            f"link {text}: {producer}.{output} is {_kind(given)}, but {consumer}.{wanted.name} takes {_kind(wanted)}"
        )


def _kind(info: TensorInfo) -> str:
    return f"{info.dtype}{'' if info.shape is None else [d if d is not None else '?' for d in info.shape]}"


def _check_cycles(links: Sequence[Link]) -> None:
    feeds: dict[str, set[str]] = {}
    for link in links:
        feeds.setdefault(link.consumer, set()).add(link.producer)

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " <- ".join((*path[path.index(name) :], name))
            raise CalibrationError(f"links go round in a circle: {circle}; give feeds for one of these inputs instead")
        for producer in sorted(feeds.get(name, ())):
            walk(producer, (*path, name))

    for name in feeds:
        walk(name, ())


@dataclass
class LinkedFeeds:
    """Complete the feeds of graphs by what other graphs give; each float model runs once per sample, in order.

    What was computed waits in a temporary file: one sample at a time is in memory.

    Attributes:
        links: by exact names.
        graphs: the graphs by name.
    """

    links: tuple[Link, ...]
    graphs: Mapping[str, _Linked]
    done: dict[tuple[str, str], FeedSource] = field(default_factory=dict)

    def options(self, name: str) -> Options:
        """Return a graph's options with calibration and evaluation feeds that lack nothing."""
        options = self.graphs[name].options
        if not any(link.consumer == name for link in self.links):
            return options
        calibration = self.source(name, "calibration")
        evaluation = None if options.evaluation is None else self.source(name, "evaluation")
        return replace(options, calibration=calibration, evaluation=evaluation)

    def source(self, name: str, kind: str) -> FeedSource:
        """Return the complete feeds of one graph.

        Args:
            name: the graph.
            kind: ``calibration`` or ``evaluation``.

        Raises:
            CalibrationError: feeds are missing.
        """
        if (name, kind) not in self.done:
            try:
                self.done[name, kind] = self._source(name, kind)
            except QCompilerError as error:
                raise type(error)(f"{name}: {error}") from error
        return self.done[name, kind]

    def _source(self, name: str, kind: str) -> FeedSource:
        graph = self.graphs[name]
        given: Any = getattr(graph.options, kind)
        inputs = graph.runner.inputs
        mine = [link for link in self.links if link.consumer == name]
        lacking = [i for i in inputs if i.name not in {link.input for link in mine}]
        named = Path(given) if isinstance(given, str | Path) else None
        if isinstance(given, Statistics) or (named is not None and read_statistics(named) is not None):
            raise CalibrationError("links need calibration feeds, not statistics; calibrate the graphs by themselves")
        if given is None and (lacking or not mine):
            raise CalibrationError(
                f"a link needs {kind} feeds of this graph, for {', '.join(i.name for i in lacking) or 'its inputs'}"
            )
        own = None if given is None else self._own(given, inputs, lacking, graph.options.sources)
        if own is not None and len(own.inputs) == len(inputs):
            return own
        return FeedSource(
            Spool(self._complete(name, kind, own, mine)), inputs, about=None if own is None else own.about
        )

    def _own(
        self, given: Any, inputs: Sequence[TensorInfo], lacking: Sequence[TensorInfo], sources: SourceOptions
    ) -> FeedSource:
        """Open what the user gave: feeds without the linked inputs, or complete ones, whose arrays then count."""
        if isinstance(given, Iterator):
            given = Spool(given)
        errors: list[CalibrationError] = []
        for wanted in (inputs, lacking):
            made = as_feed_source(given, wanted, sources)
            try:
                next(iter(made))
            except CalibrationError as error:
                errors.append(error)
            else:
                return made
        raise errors[-1]

    def _complete(self, name: str, kind: str, own: FeedSource | None, mine: Sequence[Link]) -> Iterator[Feeds]:
        """Yield a graph's feeds with the linked inputs filled in, sample by sample."""
        producers = list(dict.fromkeys(link.producer for link in mine))
        wanted = {p: list(dict.fromkeys(link.output for link in mine if link.producer == p)) for p in producers}
        sources = [self.source(p, kind) for p in producers]
        for index, (feed, *given) in enumerate(zip_longest(own if own is not None else sources[0], *sources)):
            if feed is None or any(g is None for g in given):
                counts = "it has more feeds than" if feed is not None else "it has fewer feeds than"
                raise CalibrationError(
                    f"sample {index}: {counts} {' or '.join(producers)}; linked graphs need one feed for each other's"
                )
            made = dict(feed) if own is not None else {}
            results = {
                p: self.graphs[p].runner.run(f, wanted[p]) for p, f in zip(producers, given, strict=True)
            }  # fmt: skip
            yield {**made, **{link.input: results[link.producer][link.output] for link in mine}}


def _table(options: Options) -> Target:
    """Return the capability table that options ask for; for any engine here that of this processor."""
    return settle(replace(options, target="host") if options.target == CPU else options).target


def link_graphs(
    models: Mapping[str, ModelSource], options: Mapping[str, Options], links: Mapping[str, str]
) -> dict[str, Options]:
    """Return options per graph whose feeds are complete.

    Args:
        models: the graphs by name.
        options: what each is compiled with.
        links: ``consumer.input`` to ``producer.output``, with ``*`` for any text.

    Raises:
        CalibrationError: a link or feeds that do not fit; see `resolve_links`.
        ModelError: a model cannot be loaded.
    """
    if not links:
        return dict(options)
    for text in (*links, *links.values()):
        _end(text, list(models))
    used = {_end(text, list(models))[0] for text in (*links, *links.values())}
    graphs: dict[str, _Linked] = {}
    for name in models:
        if name not in used:
            continue
        try:
            given = import_model(models[name], shapes=options[name].fixed_shapes)
            plain = EngineOptions(optimize=False)
            _, runner, _ = load_runnable(given, OrtEngine(), plain, _table(options[name]))
            graphs[name] = _Linked(runner, options[name])
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
    made = LinkedFeeds(resolve_links(links, {n: g.runner for n, g in graphs.items()}), graphs)
    return {name: made.options(name) if name in graphs else given for name, given in options.items()}
