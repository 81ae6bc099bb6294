"""If, Loop and Scan: their bodies run step by step from the host, in memory of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler.backends.triton.program import Program, Step

if TYPE_CHECKING:
    from qcompiler.backends.triton.executor import Executor


def run_control(
    executor: Executor, step: Step, inputs: Sequence[Tensor | None], values: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """Run a control step; bodies read the values around them by name."""
    if step.operator == "If":
        condition = inputs[0]
        assert condition is not None
        body = step.bodies["then_branch" if bool(condition.reshape(-1)[0].item()) else "else_branch"]
        return _run(executor, body, values, ())
    if step.operator == "Loop":
        return _loop(executor, step, inputs, values)
    return _scan(executor, step, inputs, values)


def _run(
    executor: Executor, body: Program, outer: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    values = dict(outer)
    values.update(zip((p.name for p in body.inputs), inputs, strict=True))
    for step in body.steps:
        executor.execute(step, values, None)
    return tuple(values[p.name] if p.name in values else executor.weights[p.name] for p in body.outputs)


def _loop(
    executor: Executor, step: Step, inputs: Sequence[Tensor | None], values: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    body = step.bodies["body"]
    trips = None if inputs[0] is None else int(inputs[0].reshape(-1)[0].item())
    go_on = True if len(inputs) < 2 or inputs[1] is None else bool(inputs[1].reshape(-1)[0].item())
    state = [t for t in inputs[2:] if t is not None]
    scanned: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
    count = 0
    while go_on and (trips is None or count < trips):
        number = torch.tensor(count, dtype=torch.int64)
        made = _run(executor, body, values, [number, torch.tensor(go_on), *state])
        go_on = bool(made[0].reshape(-1)[0].item())
        state = list(made[1 : 1 + len(state)])
        for kept, tensor in zip(scanned, made[1 + len(state) :], strict=True):
            kept.append(tensor.clone())
        count += 1
    return (*state, *(torch.stack(kept) if kept else torch.zeros(0) for kept in scanned))


def _scan(
    executor: Executor, step: Step, inputs: Sequence[Tensor | None], values: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    body = step.bodies["body"]
    count = int(step.attributes["num_scan_inputs"])
    tensors = [t for t in inputs if t is not None]
    state, sequences = list(tensors[: len(tensors) - count]), tensors[len(tensors) - count :]
    axes = step.attributes.get("scan_input_axes") or [0] * count
    back = step.attributes.get("scan_input_directions") or [0] * count
    scans = len(body.outputs) - len(state)
    out_axes = step.attributes.get("scan_output_axes") or [0] * scans
    out_back = step.attributes.get("scan_output_directions") or [0] * scans
    kept: list[list[Tensor]] = [[] for _ in range(scans)]
    length = sequences[0].shape[axes[0]]
    for index in range(length):
        parts = [
            s.select(a, length - 1 - index if reverse else index)
            for s, a, reverse in zip(sequences, axes, back, strict=True)
        ]
        made = _run(executor, body, values, [*state, *parts])
        state = list(made[: len(state)])
        for rows, tensor in zip(kept, made[len(state) :], strict=True):
            rows.append(tensor.clone())
    stacked = [
        torch.stack(rows[::-1] if reverse else rows, dim=axis)
        for rows, axis, reverse in zip(kept, out_axes, out_back, strict=True)
    ]
    return (*state, *stacked)
