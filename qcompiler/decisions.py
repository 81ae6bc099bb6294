"""The decisions record: what measurement chose, with its figures; the same record gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.errors import PassError
from qcompiler.quant.plan import FORMS, Form

VERSION = 2


@dataclass(frozen=True)
class Decisions:
    """What was decided by measurement.

    Attributes:
        forms: form per fusion group.
        engine_forms: engine-specific rewrites by name.
        estimator: range estimator of activations.
        estimators: range estimator per group, where an override sets it.
        treatments: what each accuracy treatment that was kept was applied with, by its name.
        why: reason per group where there is more to say than the form.
        figures: the measurements behind the choice, for people; replay ignores them.
        context: engine, version, processor, threads, target, recipe, digest of the model.
    """

    forms: dict[str, Form] = field(default_factory=dict)
    engine_forms: dict[str, str] = field(default_factory=dict)
    estimator: str = "min-max"
    estimators: dict[str, str] = field(default_factory=dict)
    treatments: dict[str, dict[str, Any]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    context: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as JSON text, keys sorted."""
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Decisions:
        """Read what `to_json` wrote.

        Raises:
            PassError: not a decisions record, or one of a version this release does not know.
        """
        try:
            data = json.loads(text)
            if "set" in data and "graphs" in data:
                raise PassError(
                    f"the decisions record is of several graphs: {', '.join(data['graphs'])}; give them all"
                )
            version = data.pop("version")
            made = Decisions(**data)
        except KeyError as error:
            raise PassError(f"not a decisions record: it lacks {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise PassError(f"not a decisions record: {error}") from error
        if version != VERSION:
            raise PassError(f"the decisions record has version {version}, this release reads {VERSION}; compile anew")
        for part in ("forms", "engine_forms", "treatments", "why", "figures", "context"):
            if not isinstance(getattr(made, part), dict):
                raise PassError(f"not a decisions record: expected a table in {part!r}, found {getattr(made, part)!r}")
        if not isinstance(made.estimator, str):
            raise PassError(f"not a decisions record: expected a text as 'estimator', found {made.estimator!r}")
        if bad := [f for f in made.forms.values() if f not in FORMS]:
            raise PassError(f"the decisions record names the unknown form {bad[0]!r}")
        return made


@dataclass(frozen=True)
class SetDecisions:
    """What was decided for several graphs that were compiled together: one record per graph, by its name."""

    graphs: Mapping[str, Decisions]

    def to_json(self) -> str:
        """Return the records as JSON text, keys sorted."""
        graphs = {name: json.loads(record.to_json()) for name, record in self.graphs.items()}
        return json.dumps({"set": VERSION, "graphs": graphs}, sort_keys=True, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> SetDecisions:
        """Read what `to_json` wrote.

        Raises:
            PassError: not the record of a set, or one of a version this release does not know.
        """
        try:
            data = json.loads(text)
            version, graphs = data["set"], dict(data["graphs"])
        except (ValueError, KeyError, TypeError) as error:
            raise PassError(f"not a decisions record of several graphs: {type(error).__name__}: {error}") from error
        if version != VERSION:
            raise PassError(f"the decisions record has version {version}, this release reads {VERSION}; compile anew")
        made = {}
        for name, record in graphs.items():
            try:
                made[name] = Decisions.from_json(json.dumps(record))
            except PassError as error:
                raise PassError(f"{name}: {error}") from error
        return SetDecisions(made)

    @staticmethod
    def read(path: str | Path) -> SetDecisions:
        """Read the file of a record.

        Raises:
            PassError: the file cannot be read, or is none.
        """
        try:
            return SetDecisions.from_json(Path(path).read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise PassError(f"cannot read the decisions record {path}: {error.strerror or error}") from error
        except PassError as error:
            raise PassError(f"{path}: {error}") from error
