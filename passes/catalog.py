"""All passes there are, for pipelines written as text and for ``qcompiler passes``."""

from __future__ import annotations

from qcompiler.passes.assign_channels_last import AssignChannelsLast
from qcompiler.passes.assign_float_type import AssignFloatType
from qcompiler.passes.avoid_engine_traps import AvoidEngineTraps
from qcompiler.passes.cancel_transposes import CancelTransposes
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.correct_bias import CorrectBias
from qcompiler.passes.deduplicate import Deduplicate
from qcompiler.passes.eliminate_identity import EliminateIdentity
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.fold_casts import FoldCasts
from qcompiler.passes.fold_constants import FoldConstants
from qcompiler.passes.fold_focus import FoldFocus
from qcompiler.passes.fold_mul_add_into_weights import FoldMulAddIntoWeights
from qcompiler.passes.fold_reshapes import FoldReshapes
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fold_shapes import FoldShapes
from qcompiler.passes.fuse_batch_norm import FuseBatchNorm
from qcompiler.passes.fuse_epilogues import FuseEpilogues
from qcompiler.passes.fuse_matmul_add import FuseMatmulAdd
from qcompiler.passes.fuse_norms import FuseNorms
from qcompiler.passes.fuse_pad import FusePad
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.import_qdq import ImportQdq
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.inline_constant_if import InlineConstantIf
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.lower_openvino import LowerOpenvino
from qcompiler.passes.lower_tensorrt import LowerTensorrt
from qcompiler.passes.lower_triton import LowerTriton
from qcompiler.passes.normalize_activations import NormalizeActivations
from qcompiler.passes.normalize_gemm import NormalizeGemm
from qcompiler.passes.order_operands import OrderOperands
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.passes.prepack_weights import PrepackWeights
from qcompiler.passes.recognize_gelu import RecognizeGelu
from qcompiler.passes.recognize_layer_norm import RecognizeLayerNorm
from qcompiler.passes.recognize_silu import RecognizeSilu
from qcompiler.passes.remove_unused import RemoveUnused
from qcompiler.passes.round_adaptively import RoundAdaptively
from qcompiler.passes.smooth_activations import SmoothActivations
from qcompiler.passes.split_outlier_channels import SplitOutlierChannels
from qcompiler.passes.store_half_precision import StoreHalfPrecision
from qcompiler.passes.widen_half_precision import WidenHalfPrecision
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.registry import PassRegistry

PASSES: tuple[type[Pass], ...] = (
    WidenHalfPrecision,
    ImportQdq,
    Canonicalize,
    RemoveUnused,
    FoldConstants,
    InlineConstantIf,
    EliminateIdentity,
    FoldCasts,
    InferShapes,
    FoldShapes,
    FoldReshapes,
    Deduplicate,
    RecognizeLayerNorm,
    RecognizeGelu,
    RecognizeSilu,
    CancelTransposes,
    NormalizeActivations,
    FusePad,
    FoldFocus,
    FuseBatchNorm,
    NormalizeGemm,
    FuseMatmulAdd,
    FoldMulAddIntoWeights,
    OrderOperands,
    EqualizeLayers,
    SmoothActivations,
    SplitOutlierChannels,
    PlanQuantization,
    RoundAdaptively,
    CorrectBias,
    InsertQdq,
    FoldScales,
    FuseQdq,
    LowerOnnxruntime,
    LowerOpenvino,
    LowerTensorrt,
    LowerTriton,
    AssignChannelsLast,
    FuseEpilogues,
    FuseNorms,
    PrepackWeights,
    AssignFloatType,
    AvoidEngineTraps,
    StoreHalfPrecision,
)
"""The shipped pass classes, in the order in which a build meets them."""

DEFAULT_PIPELINE = (
    "widen-half-precision,import-qdq,canonicalize,plan-quantization,insert-qdq,fold-scales,fuse-qdq,lower-onnxruntime,"
    "avoid-engine-traps,store-half-precision"
)
"""What `qcompiler.compile` runs, as a pipeline string."""


def shipped_passes() -> PassRegistry:
    """Return the registry of the shipped passes; other packages' are added by `PassRegistry.with_entry_points`."""
    return PassRegistry(PASSES)
