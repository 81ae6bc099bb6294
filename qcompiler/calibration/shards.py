"""A shard of a run, and how another process does one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.observe import Observer, blank
from qcompiler.calibration.statistics import Parts, Statistics
from qcompiler.engine import Engine, Feeds
from qcompiler.ir.reader import read_model
from qcompiler.ir.serialize import save_model


@dataclass(frozen=True)
class Shard:
    """A few feeds, their numbers over the whole run and their digests."""

    indices: tuple[int, ...]
    feeds: tuple[Feeds, ...]
    digests: tuple[str, ...]


def observe_shard(observer: Observer, shard: Shard) -> Statistics:
    """Return what one shard gives."""
    made = blank(())
    for index, feed in zip(shard.indices, shard.feeds, strict=True):
        observer.observe(feed, index, made)
    return made


@dataclass(frozen=True)
class Remote:
    """What is to be observed as another process gets it: the model is a file, or bytes where no disk is shared.

    Attributes:
        path: file of the model on this machine.
        names: see `observe.Observer`; so are the following.
        payload: the file's content, for workers that do not see it.
        digest: stands for the model and for the other fields.
    """

    path: str
    names: tuple[str, ...]
    engine: Engine
    threads: int
    memory: int
    squares: tuple[str, ...]
    parts: Mapping[str, Parts]
    payload: bytes | None = None
    digest: str = ""

    def written(self, model: ir.Model) -> Remote:
        """Write the model to the path and return this with its digest."""
        save_model(model, self.path)
        engine = (self.engine.name, self.engine.version, self.threads, self.memory)
        wanted = (self.names, sorted(self.squares), sorted(self.parts.items(), key=str))
        with Path(self.path).open("rb") as file:
            return replace(self, digest=f"{hashlib.file_digest(file, 'sha256').hexdigest()} {engine} {wanted}")

    def with_payload(self) -> Remote:
        """Return this with the model itself: the workers do not see this machine's disk."""
        return self if self.payload is not None else replace(self, payload=Path(self.path).read_bytes())


class ModelNotFoundError(Exception):
    """The worker does not see the file that the model was written to."""


def observe_remote(remote: Remote, shard: Shard) -> Statistics:
    """Do one shard in another process, which keeps its sessions from shard to shard.

    Raises:
        ModelNotFoundError: the process does not see the model's file, and got no bytes.
    """
    if remote.payload is None and not Path(remote.path).is_file():
        raise ModelNotFoundError(remote.path)
    return observe_shard(_observer(_Keyed(remote.digest, remote)), shard)


@dataclass(frozen=True)
class _Keyed:
    """A remote plan that is equal to another of the same model."""

    digest: str
    remote: Remote = field(compare=False)


@lru_cache(maxsize=1)
def _observer(keyed: _Keyed) -> Observer:
    remote = keyed.remote
    model = read_model(remote.payload if remote.payload is not None else remote.path)
    return Observer(model, remote.names, remote.engine, remote.threads, remote.memory, remote.squares, remote.parts)
