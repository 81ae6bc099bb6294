"""Compile for the cache: in this process, or in a worker from what it was handed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from qcompiler.dropin.digests import model_digest
from qcompiler.dropin.store import MODEL, Cache
from qcompiler.errors import ModelError, QCompilerError

Source = str | bytes
"""A model's path, or its bytes."""


@dataclass(frozen=True)
class Order:
    """One compilation for the cache.

    Attributes:
        folder: the cache.
        key: the entry to make.
        source: the model.
        digest: what the model was when the order was given.
        name: what the model is called in lists.
        options: keyword arguments of `qcompiler.compile`, calibration left out.
    """

    folder: Path
    key: str
    source: Source
    digest: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, calibration: Any, file: IO[bytes]) -> bool:
        """Write the order for a worker; return whether it can go there: a lambda, say, is this process's alone."""
        try:
            # The worker's __main__ is another one: what a script defines does not exist there.
            own = b"__main__" in pickle.dumps(self.options) or getattr(calibration, "__module__", "") == "__main__"
            if not own:
                pickle.dump((self, calibration), file, protocol=pickle.HIGHEST_PROTOCOL)
                file.flush()
                file.seek(0)
        except (OSError, MemoryError):
            raise
        except Exception:  # whatever the objects of users raise
            return False
        return not own


def build(order: Order, calibration: Any, samples: int) -> None:
    """Compile and publish the entry, or the reason why there is none. Hold the lock of the key.

    Args:
        order: what to compile.
        calibration: feeds, as `qcompiler.compile` takes them.
        samples: number of feeds, 0 where it is not known.

    Raises:
        OSError: the cache cannot be written.
        MemoryError: not the model's fault, and not noted.
    """
    cache = Cache(order.folder)
    try:
        _compile(cache, order, calibration, samples)
    except (OSError, MemoryError):
        raise
    except QCompilerError as error:
        cache.refuse(order.key, str(error), order.name)
    except Exception as error:  # a bug of ours must not cost a start each time
        cache.refuse(order.key, f"internal error: {type(error).__name__}: {error}", order.name)


def _compile(cache: Cache, order: Order, calibration: Any, samples: int) -> None:
    from qcompiler.api import compile as compile_model

    if model_digest(order.source) != order.digest:
        raise ModelError("the model's file has changed since the session was made")
    compiled = compile_model(order.source, calibration=calibration, executor="inline", **order.options)
    with cache.staging(order.key) as files:
        compiled.save(files / MODEL)
        _check_border(order.source, files / MODEL)
        note = {
            "name": order.name,
            "samples": samples,
            "build": compiled.report.to_dict(),
            "remarks": len(compiled.remarks),
            "pid": os.getpid(),
        }
        cache.store(order.key, files, note)


def _check_border(source: Source, made: Path) -> None:
    """Refuse a result whose inputs, outputs or metadata a caller would see differ.

    Raises:
        ModelError: they differ.
    """
    from qcompiler.backends.onnxruntime import OrtEngine

    engine = OrtEngine()
    before, after = (engine.load(model).session for model in (source, made))
    for what in ("get_inputs", "get_outputs"):
        given, now = ([(v.name, v.type, v.shape) for v in getattr(s, what)()] for s in (before, after))
        if given != now:
            raise ModelError(f"the compiled model's {what[4:]} differ: expected {given}, found {now}")
    given_meta, now_meta = (_metadata(s.get_modelmeta()) for s in (before, after))
    if given_meta != now_meta:
        raise ModelError(f"the compiled model's metadata differ: expected {given_meta}, found {now_meta}")


def _metadata(meta: Any) -> tuple[Any, ...]:
    return (
        meta.producer_name, meta.graph_name, meta.domain, meta.description, meta.graph_description, meta.version,
        dict(meta.custom_metadata_map),
    )  # fmt: skip
