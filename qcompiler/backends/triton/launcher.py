"""Launch real kernels: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends.triton.kernel_calls import has_kernel, kernel_call, output_names
from qcompiler.backends.triton.program import Step
from qcompiler.backends.triton.shapes import Tensor as Known
from qcompiler.backends.triton.shapes import infer
from qcompiler.backends.triton.tensors import TYPES
from qcompiler.kernels.launching import launch
from qcompiler.kernels.operand import dtype_name


@dataclass(frozen=True)
class Launcher:
    """Launches steps.

    Attributes:
        arch: whose configurations are taken, such as ``sm90``.
    """

    arch: str

    def __call__(self, step: Step, given: Mapping[str, Any], outs: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Run a step's kernel and return its outputs, or None where the project has no kernel for it.

        Args:
            step: a kernel's step.
            given: tensors by argument (numbers among them are ignored: the step has them).
            outs: where outputs are to lie, or None.
        """
        if not has_kernel(step.operator):
            return None
        inputs = {name: given[name] for name in step.arguments}
        found: list[Tensor] = []
        outputs: dict[str, Tensor] = {}
        for index, name in enumerate(output_names(step)[: len(step.outputs)]):
            if not step.outputs[index]:
                found.append(torch.empty(0))
                continue
            out = outs[index]
            made = out if out is not None else self._empty(step, index, inputs)
            outputs[name] = made
            found.append(made)
        call = kernel_call(step, inputs, outputs)
        if call is None:
            return None
        config = call.config(self.arch)
        tensors = dict(call.tensors)
        for name, operand in call.contract.scratch(call.dims, call.options, config).items():
            tensors[name] = torch.empty(operand.shape, dtype=TYPES[operand.dtype], device=found[0].device)
        launch(call.contract.name, tensors, call.options, config)
        return found

    @staticmethod
    def _empty(step: Step, index: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Make room for an output that the plan has no place for, as in the body of a Loop."""
        known = [Known(dtype_name(inputs[n]), tuple(inputs[n].shape)) for n in step.arguments]
        made = infer(step, known, {}, 0)[index]
        assert made.shape is not None
        return torch.empty(made.shape, dtype=TYPES[made.dtype], device=next(iter(inputs.values())).device)
