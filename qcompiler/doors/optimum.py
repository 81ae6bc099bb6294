"""A quantizer with the interface of Hugging Face Optimum's ``ORTQuantizer`` that compiles with qcompiler."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from optimum.onnxruntime import ORTConfig, ORTQuantizer
from optimum.onnxruntime.configuration import CalibrationConfig, QuantizationConfig
from optimum.onnxruntime.preprocessors import QuantizationPreprocessor
from optimum.utils.save_utils import maybe_save_preprocessors

from qcompiler.api import compile as compile_api
from qcompiler.calibration.objects import is_dataset
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.decisions import Decisions
from qcompiler.engine import ShapeRange
from qcompiler.errors import CalibrationError, PassError
from qcompiler.ir.graph import all_nodes
from qcompiler.ir.reader import read_model
from qcompiler.options import Calibration
from qcompiler.quant.plan import Form
from qcompiler.recipes.recipe import Recipe, load_recipe
from qcompiler.results import write_results


@dataclass(frozen=True)
class _WithFloats(Recipe):
    """A recipe that leaves nodes in float which Optimum's objects name; many of those are in no group at all.

    Attributes:
        excluded: names of nodes.
        nodes: names of all nodes of the model as it came.
    """

    excluded: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()

    def pinned(self, groups: Mapping[str, tuple[Form, ...]]) -> tuple[dict[str, Form], dict[str, str]]:
        """Return (form, estimator) per pinned group.

        Raises:
            PassError: as for `Recipe`, or an excluded name is no node's.
        """
        forms, estimators = super().pinned(groups)
        for name in sorted(self.excluded - self.nodes - set(groups)):
            close = difflib.get_close_matches(name, self.nodes) or sorted(self.nodes)[:5]
            raise PassError(f"nodes_to_exclude names {name!r}, which no node is; there are: {', '.join(close)}")
        return {**forms, **dict.fromkeys(sorted(self.excluded & set(groups)), "float")}, estimators


class QCompilerQuantizer(ORTQuantizer):  # type: ignore[misc]  # Optimum has no types
    """Quantize an ONNX model of a folder as ``optimum.onnxruntime.ORTQuantizer`` does, with qcompiler.

    ``from_pretrained(folder_or_model, file_name=...)`` and ``get_calibration_dataset`` are Optimum's own. `fit` takes
    the data, `quantize` compiles: the model is the one that ``qcompiler compile`` writes, the same bytes given the same
    decisions. A folder of several ONNX files (encoder, decoder) takes one quantizer per file, by ``file_name``.
    """

    _parts: tuple[Any, ...] = ()
    _batch_size: int = 1

    def fit(
        self,
        dataset: Iterable[Any],
        calibration_config: CalibrationConfig | None = None,
        onnx_augmented_model_name: str | Path | None = None,
        operators_to_quantize: Sequence[str] | None = None,
        batch_size: int = 1,
        use_external_data_format: bool = False,
        use_gpu: bool = False,
        force_symmetric_range: bool = False,
    ) -> Calibration:
        """Take the calibration data, in place of what was taken before; `quantize` observes them.

        Args:
            dataset: a ``datasets.Dataset`` with a column per input, or an iterable of feeds ``{input: array}``, batch
                axis included.
            calibration_config: not used: the range estimator is chosen by measurement.
            onnx_augmented_model_name: not used: no such file is written.
            operators_to_quantize: not used: what is quantized follows from the target.
            batch_size: rows of the data set per feed, where the model leaves its batch axis open.
            use_external_data_format: not used: weights are read from where they lie.
            use_gpu: not used.
            force_symmetric_range: not used: symmetry follows from the target.

        Returns:
            The data, for `quantize` as ``calibration_tensors_range``; it takes them from here as well.
        """
        self._parts = ()
        self.partial_fit(dataset, batch_size=batch_size)
        return self.compute_ranges()

    def partial_fit(
        self,
        dataset: Iterable[Any],
        calibration_config: CalibrationConfig | None = None,
        onnx_augmented_model_name: str | Path | None = None,
        operators_to_quantize: Sequence[str] | None = None,
        batch_size: int = 1,
        use_external_data_format: bool = False,
        use_gpu: bool = False,
        force_symmetric_range: bool = False,
    ) -> None:
        """Take more calibration data; arguments as for `fit`.

        Raises:
            CalibrationError: the batch size is another one than before.
        """
        if self._parts and self._batch_size != batch_size:
            raise CalibrationError(f"batch_size is {batch_size}, before it was {self._batch_size}; give one number")
        self._parts, self._batch_size = (*self._parts, dataset), batch_size

    def compute_ranges(self) -> Calibration:
        """Return the data that `fit` or `partial_fit` took.

        Raises:
            CalibrationError: there is none.
        """
        if not self._parts:
            raise CalibrationError("there is no calibration data: call fit or partial_fit first")
        if len(self._parts) == 1:
            return self._parts[0]  # type: ignore[no-any-return]  # datasets has no types here
        if all(map(is_dataset, self._parts)):
            from datasets import concatenate_datasets

            return concatenate_datasets(list(self._parts))  # type: ignore[no-any-return]  # datasets has no types here
        return list(chain.from_iterable(self._parts))

    def quantize(
        self,
        quantization_config: QuantizationConfig | None = None,
        save_dir: str | Path | None = None,
        file_suffix: str | None = "quantized",
        calibration_tensors_range: Calibration | None = None,
        use_external_data_format: bool = False,
        preprocessor: QuantizationPreprocessor | None = None,
        *,
        target: str = "host",
        recipe: str | Recipe | None = None,
        overrides: str | Path | None = None,
        budget: str | Sequence[str] | None = None,
        min_sqnr: float | None = None,
        decisions: Decisions | str | Path | None = None,
        guard: bool = True,
        emit: str = "auto",
        opset: int | None = None,
        shapes: Mapping[str, Sequence[int] | ShapeRange] | None = None,
        threads: int | None = None,
        sources: SourceOptions | None = None,
        synthetic_calibration: int = 0,
        random_calibration: int = 0,
    ) -> Path:
        """Compile the model into ``<name>_<file_suffix>.onnx`` in a folder that Optimum's classes load.

        Beside it: Optimum's ``ort_config.json``, the model's configuration and preprocessors, the decisions record and
        the report.

        Args:
            quantization_config: of Optimum's, three things count: ``is_static`` picks the recipe where ``recipe`` is
                None, ``nodes_to_exclude`` stay float (those that are in no fusion group do so anyway), and
                ``nodes_to_quantize`` is refused. Formats, symmetry and granularity follow from the target.
            save_dir: folder to write to; it is made.
            file_suffix: end of the file's name.
            calibration_tensors_range: the data that `fit` returned, or any that `qcompiler.compile` takes; by default
                what `fit` took.
            use_external_data_format: kept in ``ort_config.json``; weights lie outside the file where they must.
            preprocessor: Optimum's; the nodes that it excludes stay float.
            target: as for `qcompiler.compile`, and so are the others from here.
            recipe: by default int8; with a configuration, int8-static or int8-dynamic.
            overrides: path of a .toml.
            budget: bounds.
            min_sqnr: least SQNR in dB.
            decisions: a record to repeat without timing.
            guard: measure speed and accuracy.
            emit: ``auto``, ``qdq`` or ``qoperator``.
            opset: operator set of the result.
            shapes: input name to lengths.
            threads: threads while measuring.
            sources: how rows become feeds; by default ``batch_size`` rows each of what `fit` took.
            synthetic_calibration: feeds to make up from the graph.
            random_calibration: random feeds.

        Returns:
            ``save_dir``.

        Raises:
            QCompilerError: what `qcompiler.compile` refuses, a missing folder, a list of nodes to quantize, or an
                excluded name that no node of the model has.
        """
        if save_dir is None:
            raise PassError("quantize needs save_dir, the folder to write to")
        data = calibration_tensors_range
        if data is None and self._parts:
            data = self.compute_ranges()
        chosen = self._recipe(recipe, quantization_config, preprocessor)
        compiled = compile_api(
            self.onnx_model_path, target=target, recipe=chosen, calibration=data, overrides=overrides, budget=budget,
            shapes=shapes, decisions=decisions, threads=threads, guard=guard, emit=emit, min_sqnr=min_sqnr,
            random_calibration=random_calibration, opset=opset, synthetic_calibration=synthetic_calibration,
            sources=sources or SourceOptions(batch=self._batch_size if self._parts else None),
        )  # fmt: skip
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.onnx_model_path.stem + (f"_{file_suffix}" if file_suffix else "")
        write_results(compiled, folder / f"{stem}.onnx", folder / f"{stem}.report.json")
        self._write_configuration(folder, quantization_config, use_external_data_format)
        return folder

    def _recipe(
        self,
        recipe: str | Recipe | None,
        config: QuantizationConfig | None,
        preprocessor: QuantizationPreprocessor | None,
    ) -> Recipe:
        """Return the recipe, with the nodes that Optimum's objects exclude left in float."""
        if recipe is None:
            recipe = "int8" if config is None else "int8-static" if config.is_static else "int8-dynamic"
        made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        wanted, excluded = preprocessor.collect(self.onnx_model_path) if preprocessor is not None else (set(), set())
        if config is not None:
            wanted, excluded = {*wanted, *config.nodes_to_quantize}, {*excluded, *config.nodes_to_exclude}
        if wanted:
            raise PassError(
                f"nodes_to_quantize names {sorted(wanted)[0]!r}; exclude the others instead (nodes_to_exclude), or pin "
                "forms by overrides"
            )
        if not excluded:
            return made
        nodes = frozenset(str(node.name) for node in all_nodes(read_model(self.onnx_model_path)))
        kept = {f.name: getattr(made, f.name) for f in fields(Recipe)}
        return _WithFloats(**kept, excluded=frozenset(excluded), nodes=nodes)

    def _write_configuration(self, folder: Path, config: QuantizationConfig | None, external: bool) -> None:
        """Write what makes the folder one of Optimum's."""
        ORTConfig(quantization=config, use_external_data_format=external).save_pretrained(folder)
        if self.config is not None:
            self.config.save_pretrained(folder)
        maybe_save_preprocessors(self.onnx_model_path.parent, folder)
