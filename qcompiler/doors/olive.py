"""A pass of Microsoft Olive that compiles an ONNX model with qcompiler.

Olive finds a pass that is not its own in a package configuration. ``python -m qcompiler.doors.olive FILE`` writes the
one that lists Olive's passes and this one; then ``olive run --config workflow.json --package-config FILE``, or in
Python ``olive.workflows.run(workflow, package_config=package_config())``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, ParamCategory, PassConfigParam

from qcompiler.api import compile as compile_api
from qcompiler.compiled import decisions_path
from qcompiler.engine import Feeds
from qcompiler.errors import CalibrationError, TargetError
from qcompiler.results import write_results

NAME = "QCompilerQuantization"
TARGETS = {
    "CPUExecutionProvider": "host",
    "OpenVINOExecutionProvider": "ort-openvino",
    "TensorrtExecutionProvider": "ort-tensorrt",
    "NvTensorRTRTXExecutionProvider": "tensorrt",
    "CUDAExecutionProvider": "ort-cuda",
}
"""Target of an execution provider, where the pass names none."""


def package_config() -> dict[str, Any]:
    """Return Olive's own package configuration with this pass added, as ``package_config`` takes it."""
    path = Path(OlivePackageConfig.get_default_config_path())
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["passes"][NAME] = {
        "module_path": f"qcompiler.doors.olive.{NAME}",
        "supported_providers": list(TARGETS),
        "supported_accelerators": ["cpu", "gpu"],
        "supported_precisions": ["int4", "int8", "int16", "fp16"],
        "supported_quantization_encodings": ["qdq", "qop"],
        "dataset": "dataset_optional",
    }
    return config


def target_of(accelerator: AcceleratorSpec) -> str | None:
    """Return the target that stands for an accelerator's execution provider; None if there is none."""
    return TARGETS.get(str(accelerator.execution_provider or "CPUExecutionProvider"))


class QCompilerQuantization(Pass):  # type: ignore[misc]  # Olive has no types
    """Compile an ONNX model with qcompiler; each parameter is one of `qcompiler.compile`.

    The result is the model that ``qcompiler compile`` writes, the same bytes given the same decisions. The decisions
    record and the report lie beside it, and Olive copies them along. Olive caches by the text of the configuration: a
    file that is named there and changes does not start a new run, a new ``cache_dir`` does.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        """Return False: the target follows from the accelerator."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        def param(type_: Any, default: Any, description: str, category: Any = ParamCategory.NONE) -> PassConfigParam:
            return PassConfigParam(type_=type_, default_value=default, description=description, category=category)

        path = Union[Path, str]  # noqa: UP007  # Olive reads the type's parts
        return {
            "data_config": param(
                Optional[Union[DataConfig, dict]],  # noqa: UP007, UP045
                None,
                "Calibration data. Its batches are feeds by input name; labels and unknown columns are left out.",
            ),
            "calibration": param(
                path, None, "Calibration data instead of data_config: a path as `qcompiler compile --calibration`.",
                ParamCategory.DATA,
            ),
            "target": param(str, target_of(accelerator_spec), "Capability table; by default the execution provider's."),
            "recipe": param(str, "int8", "A recipe's name or the path of a .toml."),
            "overrides": param(path, None, "A .toml with [[override]] rows.", ParamCategory.PATH),
            "budget": param(Union[str, list], None, "Bounds such as sqnr>=30."),  # noqa: UP007
            "min_sqnr": param(float, None, "Least SQNR per output in dB."),
            "decisions": param(path, None, "Decisions record to repeat without timing.", ParamCategory.PATH),
            "guard": param(bool, True, "Measure speed and accuracy, and undo losses."),
            "emit": param(str, "auto", "auto, qdq or qoperator."),
            "opset": param(int, None, "ONNX operator set of the result."),
            "shapes": param(dict, None, "Input name to lengths, where axes are open."),
            "threads": param(int, None, "Threads inside one operator while measuring."),
            "synthetic_calibration": param(int, 0, "Feeds to make up from the graph instead of data."),
            "random_calibration": param(int, 0, "Random feeds instead of data."),
        }  # fmt: skip

    @classmethod
    def validate_config(cls, config: BasePassConfig, accelerator_spec: AcceleratorSpec) -> bool:
        """Return whether the accelerator has a target."""
        return bool(super().validate_config(config, accelerator_spec)) and config.target is not None

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        if config.target is None:
            provider = self.accelerator_spec.execution_provider
            known = ", ".join(TARGETS)
            raise TargetError(f"no target stands for {provider}: set the pass's target (known providers: {known})")
        if config.data_config is not None and config.calibration is not None:
            raise CalibrationError("give one of data_config and calibration")
        compiled = compile_api(
            model.model_path, target=config.target, recipe=config.recipe, calibration=_feeds(config, model),
            overrides=config.overrides, budget=config.budget, shapes=config.shapes, decisions=config.decisions,
            threads=config.threads, guard=config.guard, emit=config.emit, min_sqnr=config.min_sqnr,
            random_calibration=config.random_calibration, opset=config.opset,
            synthetic_calibration=config.synthetic_calibration,
        )  # fmt: skip
        # The name that Olive gives a workflow's output: what lies beside it is named alike.
        output = Path(resolve_onnx_path(output_model_path, "model.onnx"))
        report = output.with_suffix(".report.json")
        write_results(compiled, output, report)
        attributes = dict(model.model_attributes or {})
        beside = {str(decisions_path(output)), str(report), *(attributes.get("additional_files") or ())}
        attributes["additional_files"] = sorted(beside)
        return ONNXModelHandler(
            model_path=str(output.parent),
            onnx_file_name=output.name,
            inference_settings=model.inference_settings,
            model_attributes=attributes,
        )


def _feeds(config: BasePassConfig, model: ONNXModelHandler) -> str | Callable[[], Iterator[Feeds]] | None:
    """Return the calibration data as `qcompiler.compile` takes it; None where there is none."""
    if config.calibration is not None:
        return str(config.calibration)
    if config.data_config is None:
        return None
    given = config.data_config
    container = (given if isinstance(given, DataConfig) else DataConfig(**given)).to_data_container()

    def feeds() -> Iterator[Feeds]:
        reader = container.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)
        while (feed := reader.get_next()) is not None:
            yield feed

    return feeds


def main() -> None:
    """Write the package configuration to the file that is named, or to standard output."""
    text = json.dumps(package_config(), indent=1) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
