"""The models that are measured: a folder of models with a ``load.py`` of its own, and the demo models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED_MODELS = ROOT.parent / "shared" / "models"
DEMO = "demo"
"""Group of the models in ``examples/``."""

Array = npt.NDArray[Any]
Outputs = list[Array]
"""What a model gives for one feed, in the order of its outputs."""
RunFeed = Callable[[Mapping[str, Array]], Outputs]

_LESS_IS_BETTER = frozenset(
    {"loss", "ppl", "perplexity", "bits_per_byte", "cross_entropy", "error", "wer", "cer", "eer", "mse", "rmse", "mae"}
)


@dataclass(frozen=True)
class Subject:
    """One model with its data.

    Attributes:
        group: where it comes from, ``models`` or ``demo``.
        name: its name in that group.
        path: the float (or imported Q/DQ) ONNX model.
        calibration: feeds for range finding.
        feed: the feed that is timed, the first of the evaluation data.
        run_all: runs all evaluation feeds through a function and returns its outputs, feed by feed; carried state goes
            from step to step.
        metric: maps these outputs to figures by name, the main one first.
    """

    group: str
    name: str
    path: Path
    calibration: Sequence[Mapping[str, Array]]
    feed: Mapping[str, Array]
    run_all: Callable[[RunFeed], list[Outputs]]
    metric: Callable[[list[Outputs]], dict[str, float]]


def more_is_better(metric: str) -> bool:
    """Return whether a larger figure of this name is a better one."""
    return metric.lower() not in _LESS_IS_BETTER


def load_module(path: Path) -> ModuleType:
    """Import a Python file under a name of its own.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"benchmarked_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def models_folder(given: Path | None) -> Path | None:
    """Return the folder of models that was asked for, else the one beside the checkout, if it is there."""
    if given is not None:
        return given
    return SHARED_MODELS if (SHARED_MODELS / "load.py").is_file() else None


def list_subjects(models: Path | None) -> list[tuple[str, str]]:
    """Return (group, name) of all models: those of a folder with a ``load.py``, then the demo models."""
    found = []
    if models is not None:
        found += [("models", str(name)) for name in load_module(models / "load.py").names(str(models))]
    demo = load_module(ROOT / "examples" / "demo_data.py")
    return found + [(DEMO, model.name) for model in demo.demo_models()]


def load_subject(group: str, name: str, models: Path | None) -> Subject:
    """Load one model's data by the names that `list_subjects` gives.

    Raises:
        KeyError: the group has no such model.
    """
    if group != DEMO and models is not None:
        given = load_module(models / "load.py").load(name, str(models))
        return Subject(group, name, Path(given.path), given.calib, given.evals[0], given.run_all, given.metric)
    for model in load_module(ROOT / "examples" / "demo_data.py").demo_models():
        if model.name == name:
            return _demo(model)
    raise KeyError(f"no model {name!r} in {group!r}")


def _demo(model: Any) -> Subject:
    def run_all(run: RunFeed) -> list[Outputs]:
        return [run(feed) for feed in model.evaluation]

    def metric(outputs: list[Outputs]) -> dict[str, float]:
        return {model.metric_name: model.metric([{"logits": feed[0]} for feed in outputs])}

    return Subject(DEMO, model.name, model.path, model.calibration, model.evaluation[0], run_all, metric)
