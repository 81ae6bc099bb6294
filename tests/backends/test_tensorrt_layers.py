from qcompiler.backends.tensorrt.layers import Layer, Operand, parse_layers
from qcompiler.backends.tensorrt.proof import product_of
from qcompiler.backends.tensorrt.report import BuildReport, ParserIssue

_TENSOR = "{{ Name: {}, Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) Row major }}"


def _tensor(name: str, shape: str, element: str) -> str:
    return _TENSOR.format(name, shape, element)


TEXT = "\n".join(
    [
        "Layers:",
        "Name: conv1_myl0_1, LayerType: correlation, "
        f"Inputs: [ {_tensor('__mye248conv1_o.1_2_myl0', '-1,8,32,32', 'Int8')}], "
        f"Constants: [ {_tensor('w', '16,8,3,3', 'Int8')}, {_tensor('b', '1,16,1,1', 'Float')}], "
        f"Outputs: [ {_tensor('y, Outputs', '1,16,32,32', 'Float')}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        "Metadata: [ONNX Layer: conv1][ONNX Layer: x[0]/q][ONNX Layer: conv1]",
        "Name: e^bb^signal^3_myl0_0, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, EventId: 35, Metadata: ",
        f"Name: __myl_Move_myl0_2, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ {_tensor('z', '', 'Half')}], "
        "TacticName: __myl_Move_0x9f, StreamId: 0, EventId: 3, Metadata: ",
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Float, Dimensions: [1,8,32,32], Location: Device",
    ]
)


def test_layers_are_read_with_their_operands_and_origins() -> None:
    conv, move = parse_layers(TEXT)
    assert conv == Layer(
        "conv1_myl0_1",
        "correlation",
        (Operand("__mye248conv1_o.1_2_myl0", (-1, 8, 32, 32), "Int8"),),
        (Operand("w", (16, 8, 3, 3), "Int8"), Operand("b", (1, 16, 1, 1), "Float")),
        (Operand("y, Outputs", (1, 16, 32, 32), "Float"),),
        "__myelin_CASK_STUB",
        ("conv1", "x[0]/q"),
    )
    assert move == Layer(
        "__myl_Move_myl0_2", "kgen", (), (), (Operand("z", (), "Half"),), tactic="__myl_Move_0x9f", origins=()
    )


def test_text_that_is_not_understood_gives_no_layer() -> None:
    assert parse_layers("Layers:\nName: a, Type: b\nnonsense") == ()


def test_layers_of_tensorrt_proper_without_constants() -> None:
    line = (
        "Name: conv1 + relu, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, Dimensions: [1,8,4,4], "
        "Format/Datatype: Int8 }], Outputs: [ { Name: y, Location: Device, Dimensions: [1,8,4,4], "
        "Format/Datatype: Int8 }], ParameterType: Convolution, TacticName: sm80_xmma, StreamId: 0, "
        "Metadata: [ONNX Layer: conv1][ONNX Layer: relu]"
    )
    (layer,) = parse_layers("Layers:\n" + line)
    assert layer.origins == ("conv1", "relu")
    assert [o.element for o in (*layer.inputs, *layer.outputs)] == ["Int8", "Int8"]
    assert layer.tactic == "sm80_xmma"


def _layer(kind: str, name: str, inputs: str, constants: str, outputs: str = "Float") -> Layer:
    read, held, made = (
        tuple(Operand("t", (4, 4), e) for e in text.split(",") if e) for text in (inputs, constants, outputs)
    )
    return Layer(name, kind, read, held, made)


def test_products_are_told_apart_by_their_operands() -> None:
    cases = {
        ("gemm", "mm_myl0_1", "Int8", "Int8,Float,Float"): (True, False, "Int8 x Int8 gemm"),
        ("gemm", "qk_myl0_4", "FP8,FP8", "Float,Float"): (True, False, "FP8 x FP8 gemm"),
        ("gemm", "mm_myl0_3", "FP4E2M1,FP8", "FP4E2M1,Float,Float,FP8"): (True, False, "FP4E2M1 x FP4E2M1 gemm"),
        ("gemm", "mm_myl0_2", "Half,Half", "Float,Float"): (False, False, "Half x Half gemm"),
        ("correlation", "c_myl0_2", "Float", "Float,Float"): (False, False, "Float x Float correlation"),
        ("runtime_fusion", "__myl_CastMulCastFc_myl0_0", "Half", "Half,Int8"): (
            False, True, "Float x Int8 decoded in runtime_fusion CastMulCastFc",
        ),
        ("runtime_fusion", "__myl_ReplCastMulCastFc_myl0_1", "Half", "Int4,Half"): (
            False, True, "Float x Int4 decoded in runtime_fusion ReplCastMulCastFc",
        ),
        # both operands are stored, and both are decoded in front of the product
        ("runtime_fusion", "__myl_CastMulCastMulCastFc_myl0_1", "Int8", "Half,Int8"): (
            False, True, "Float x Int8 decoded in runtime_fusion CastMulCastMulCastFc",
        ),
        # a small convolution inside a generated kernel, right behind its quantization
        ("kgen", "__myl_MulAddReluMulMinMaxRounCastCorrMulAddMove_myl0_5", "Float", "Float,Int8,Float"): (
            True, False, "Int8 x Int8 in kgen MulAddReluMulMinMaxRounCastCorrMulAddMove",
        ),
        ("runtime_fusion", "__myl_CorrSilu_myl0_5", "Float", "Float,Float"): (
            False, False, "Float x Float in runtime_fusion CorrSilu",
        ),
    }  # fmt: skip
    for (kind, name, inputs, constants), wanted in cases.items():
        found = product_of(_layer(kind, name, inputs, constants))
        assert found is not None, name
        assert (found.quantized, found.decoded, found.text) == wanted, name


def test_what_multiplies_nothing_is_no_product() -> None:
    assert product_of(_layer("kgen", "__myl_MulAddReluMulMinMaxRounCast_myl0_2", "Float", "Float", "Int8")) is None
    assert product_of(_layer("maxpool", "__mye242_pooling_myl0_3", "Int8", "", "Int8")) is None


def test_a_report_survives_its_file() -> None:
    issue = ParserIssue("INVALID_NODE", "dq", "DequantizeLinear", "input has type Int32", ("a", "b"))
    report = BuildReport("tensorrt_rtx", "1.7", 89, (issue,), parse_layers(TEXT), errors=("e",), notes=("n",))
    assert BuildReport.from_dict(report.to_dict()) == report
    assert str(issue) == "INVALID_NODE at DequantizeLinear 'dq', from a; b: input has type Int32"
