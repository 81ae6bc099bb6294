"""The ``.qcal`` file: calibration statistics, what they are of, and how far an unfinished run has come.

One file (`container`): JSON text with everything that is no array, and the arrays of every tensor's sketch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.calibration.container import damaged, read_container, write_container
from qcompiler.calibration.statistics import Statistics, TensorStatistics
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError

STATISTICS_VERSION = 1
"""Version of what the statistics mean; raised when the same feeds no longer give the same numbers."""

Ranges = Mapping[str, Mapping[str, tuple[float, float]]]
"""(low, high) by tensor and estimator."""

_DATA = "statistics"
_JOURNAL = "journal"


# ---- what the statistics are of ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What calibration statistics depend on; statistics with another key are stale.

    Attributes:
        graph: digest of the canonical graph with its weights.
        data: digest of the calibration data; None where the source has no identity.
        observed: digest of the observed names, see `names_digest`.
        engine: name and version of the engine that ran the model.
        threads: threads inside one operator.
        statistics: version of the statistics.
    """

    graph: str
    data: str | None
    observed: str
    engine: str
    threads: int
    statistics: int = STATISTICS_VERSION

    def to_about(self) -> dict[str, str]:
        """Return the key as plain text by field, the form of `Statistics.about`."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_about(about: Mapping[str, str]) -> Key | None:
        """Return the key that `to_about` wrote, None if there is none.

        Raises:
            CalibrationError: a part is missing or no number.
        """
        if not {"graph", "observed"} & set(about):
            return None
        try:
            return Key(
                about["graph"], about.get("data"), about["observed"], about["engine"], int(about["threads"]),
                int(about["statistics"]),
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            raise CalibrationError(
                f"the statistics say incompletely what they are of ({error}); calibrate anew"
            ) from None


def names_digest(names: Iterable[str]) -> str:
    """Return a digest of a set of names: 16 hexadecimal digits, whatever their order."""
    text = json.dumps(sorted(set(names)), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_key(found: Key | None, wanted: Key) -> list[str]:
    """Say in sentences in what statistics differ from what is wanted; none if they fit.

    Args:
        found: what the statistics are of; None says that they do not tell.
        wanted: what is asked for. Its ``data`` is None where the user gives the statistics in place of data.
    """
    if found is None:
        return ["the statistics do not say which model they are of"]
    sentences = []
    if found.graph != wanted.graph:
        sentences.append(
            f"the model changed: the statistics are of graph {_short(found.graph)}, this one is {_short(wanted.graph)}"
        )
    if wanted.data is not None and found.data != wanted.data:
        given = "data without an identity" if found.data is None else f"data {_short(found.data)}"
        sentences.append(f"the data changed: the statistics are of {given}, this is data {_short(wanted.data)}")
    if found.observed != wanted.observed:
        sentences.append(
            f"other tensors are wanted: the statistics are of set {_short(found.observed)}, "
            f"this is set {_short(wanted.observed)}"
        )
    if found.engine != wanted.engine:
        sentences.append(f"the engine changed: the statistics were taken with {found.engine}, this is {wanted.engine}")
    if found.threads != wanted.threads:
        sentences.append(f"the statistics were taken with {found.threads} threads, wanted are {wanted.threads}")
    if found.statistics != wanted.statistics:
        sentences.append(f"the statistics have version {found.statistics}, wanted is {wanted.statistics}")
    return sentences


def _short(digest: str) -> str:
    return digest[:12]


# ---- finished runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Qcal:
    """Everything in a ``.qcal`` file.

    Attributes:
        statistics: the sketches; its ``about`` and ``synthetic`` say what they are of.
        ranges: chosen ranges by tensor and estimator, for people: reading estimates them anew.
    """

    statistics: Statistics
    ranges: Ranges = field(default_factory=dict)

    @property
    def key(self) -> Key | None:
        """Return what the statistics are of, None if they do not tell."""
        return Key.from_about(self.statistics.about)


def chosen_ranges(statistics: Statistics, estimators: Iterable[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the range of every observed tensor by every estimator, for `write_qcal`.

    Raises:
        CalibrationError: an estimator is unknown.
    """
    wanted = tuple(estimators)
    names = [name for name in statistics if statistics.observed(name)]
    return {name: {e: statistics.range(name, e) for e in wanted} for name in names}


def write_qcal(statistics: Statistics, path: str | Path, *, ranges: Ranges | None = None) -> None:
    """Write statistics to one file, which appears whole or not at all.

    Args:
        statistics: what to write; its ``about`` (see `Key.to_about`) and ``synthetic`` are kept.
        path: the file; an existing one is replaced.
        ranges: chosen ranges, for people who read the file (`chosen_ranges`).

    Raises:
        CalibrationError: the file cannot be written, or a range is not finite.
    """
    chosen = {name: {e: list(pair) for e, pair in by.items()} for name, by in (ranges or {}).items()}
    _write(Path(path), _DATA, {"ranges": chosen}, {}, statistics)


def load_qcal(path: str | Path) -> Qcal:
    """Read a file that `write_qcal` wrote, with everything in it.

    Raises:
        CalibrationError: no such file, damaged, an unfinished run, or of another version; says what to do.
    """
    return _read(Path(path), _DATA)[0]


def read_qcal(path: str | Path) -> Statistics:
    """Read the statistics of a file that `write_qcal` wrote, equal bit for bit.

    Raises:
        CalibrationError: no such file, damaged, an unfinished run, or of another version; says what to do.
    """
    return load_qcal(path).statistics


# ---- unfinished runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """How far a run has come, so that another can go on from there.

    Attributes:
        statistics: what the feeds done so far gave.
        digests: 16 hexadecimal digits by index of each feed done, to see that they are the same feeds later.
        position: further counters of the run, such as the group of tensors at work.
    """

    statistics: Statistics
    digests: Mapping[int, str]
    position: Mapping[str, int] = field(default_factory=dict)

    @property
    def done(self) -> tuple[int, ...]:
        """Return the indices of the feeds done, ascending."""
        return tuple(sorted(self.digests))

    @property
    def key(self) -> Key | None:
        """Return what the statistics are of, None if they do not tell."""
        return Key.from_about(self.statistics.about)


def write_journal(journal: Journal, path: str | Path) -> None:
    """Write how far a run has come, in place of what was written before.

    Raises:
        CalibrationError: the file cannot be written, or a digest is not one of 16 hexadecimal digits.
    """
    if bad := [d for d in journal.digests.values() if len(d) != 16 or set(d) - set("0123456789abcdef")]:
        raise CalibrationError(f"the digest of a feed has 16 hexadecimal digits, found {bad[0]!r}")
    arrays = {
        "journal.feeds": np.array(journal.done, np.int64),
        "journal.digests": np.array([int(journal.digests[i], 16) for i in journal.done], np.uint64),
    }
    _write(Path(path), _JOURNAL, {"position": dict(journal.position)}, arrays, journal.statistics)


def read_journal(path: str | Path) -> Journal:
    """Read what `write_journal` wrote.

    Raises:
        CalibrationError: no such file, damaged, a finished run, or of another version; says what to do.
    """
    qcal, body, arrays = _read(Path(path), _JOURNAL)
    try:
        feeds, digests = arrays["journal.feeds"], arrays["journal.digests"]
        done = {int(i): f"{int(d):016x}" for i, d in zip(feeds, digests, strict=True)}
        return Journal(qcal.statistics, done, {str(k): int(v) for k, v in body["position"].items()})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise damaged(Path(path), error) from error


# ---- the file ------------------------------------------------------------------------------------------------------


def _write(
    path: Path, kind: str, extra: Mapping[str, Any], arrays: Mapping[str, Array], statistics: Statistics
) -> None:
    tensors: dict[str, Any] = {}
    everything = dict(arrays)
    # By name, so that the order in which shards were merged leaves no trace.
    for index, name in enumerate(sorted(statistics)):
        fields, own = statistics.tensors[name].state()
        tensors[name] = {"index": index, "fields": fields, "arrays": sorted(own)}
        everything |= {f"{index}.{part}": array for part, array in own.items()}
    body = {
        "kind": kind, "feeds": statistics.feeds, "about": statistics.about, "synthetic": statistics.synthetic,
        "tensors": tensors, **extra,
    }  # fmt: skip
    write_container(path, body, everything)


def _read(path: Path, kind: str) -> tuple[Qcal, dict[str, Any], dict[str, Array]]:
    """Return (content, JSON body, arrays that belong to no tensor)."""
    body, arrays = read_container(path)
    try:
        found = body["kind"]
        if found != kind and found == _JOURNAL:
            raise CalibrationError(f"{path} is of an unfinished run; finish it with --resume")
        if found != kind:
            raise CalibrationError(f"{path} is of a finished run, there is nothing to resume")
        tensors = {name: _tensor(entry, arrays) for name, entry in body["tensors"].items()}
        about = {str(k): str(v) for k, v in body["about"].items()}
        statistics = Statistics(tensors, int(body["feeds"]), about, str(body["synthetic"]))
        chosen = {n: {e: (float(a), float(b)) for e, (a, b) in by.items()} for n, by in body.get("ranges", {}).items()}
        return Qcal(statistics, chosen), body, arrays
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise damaged(path, error) from error


def _tensor(entry: Mapping[str, Any], arrays: dict[str, Array]) -> TensorStatistics:
    """Restore one tensor; what belongs to it is taken out of ``arrays``."""
    own = {part: arrays.pop(f"{entry['index']}.{part}") for part in entry["arrays"]}
    tensor = TensorStatistics.restored(entry["fields"], own)
    total = int(tensor.counts.sum())
    if tensor.counts.dtype != np.int64 or int(tensor.counts.min()) < 0 or total != tensor.count:
        raise ValueError(f"a histogram of {total} elements for a tensor of {tensor.count}")
    return tensor
