"""A small encoder, decoder and decoder with caches of one set of weights, exported as such models are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.engine import Array, Feeds

VOCABULARY, WIDTH, HIDDEN = 96, 64, 128
SOURCE, TARGET = 7, 5


def _weight(seed: int, rows: int, columns: int) -> Array:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


EMBEDDING = _weight(0, VOCABULARY, WIDTH) * 8
WEIGHTS = {
    "up": _weight(1, WIDTH, HIDDEN), "down": _weight(2, HIDDEN, WIDTH), "query": _weight(3, WIDTH, WIDTH),
    "key": _weight(4, WIDTH, WIDTH), "value": _weight(5, WIDTH, WIDTH), "out": _weight(6, WIDTH, WIDTH),
    "head": _weight(7, WIDTH, VOCABULARY),
}  # fmt: skip
SHARED = ("query", "out", "head")
"""Weights that the decoder and the one with caches have."""


def _model(
    name: str, nodes: list[onnx.NodeProto], inputs: dict[str, list[str | int]], outputs: dict[str, list[str | int]],
    weights: dict[str, Array],
) -> onnx.ModelProto:  # fmt: skip
    def info(key: str, shape: list[str | int]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if key in ("tokens", "next_token") else TensorProto.FLOAT
        return helper.make_tensor_value_info(key, kind, shape)

    graph = helper.make_graph(
        nodes, name, [info(*i) for i in inputs.items()], [info(*o) for o in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def encoder() -> onnx.ModelProto:
    """Return tokens int64 [batch, source] to last_hidden_state float32 [batch, source, 64]."""
    nodes = [
        helper.make_node("Gather", ["shared.weight", "tokens"], ["x"], name="/embed/Gather"),
        helper.make_node("MatMul", ["x", "up"], ["u"], name="/up/MatMul"),
        helper.make_node("Relu", ["u"], ["r"], name="/relu"),
        helper.make_node("MatMul", ["r", "down"], ["last_hidden_state"], name="/down/MatMul"),
    ]
    weights = {"shared.weight": EMBEDDING, "up": WEIGHTS["up"], "down": WEIGHTS["down"]}
    return _model(
        "encoder", nodes, {"tokens": ["batch", "source"]}, {"last_hidden_state": ["batch", "source", WIDTH]}, weights
    )


def _attend(prefix: str, key: str, value: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", ["x", f"{prefix}query"], ["q"], name="/query/MatMul"),
        helper.make_node("Transpose", [key], ["kt"], name="/kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="/scores/MatMul"),
        helper.make_node("Softmax", ["scores"], ["p"], name="/softmax", axis=-1),
        helper.make_node("MatMul", ["p", value], ["context"], name="/context/MatMul"),
        helper.make_node("MatMul", ["context", f"{prefix}out"], ["o"], name="/out/MatMul"),
        helper.make_node("Add", ["x", "o"], ["y"], name="/add"),
    ]


def decoder() -> onnx.ModelProto:
    """Return tokens [batch, target], encoder_hidden_states [batch, source, 64] to logits and present.0.key/value."""
    nodes = [
        helper.make_node("Gather", ["embed", "tokens"], ["x"], name="/embed/Gather"),
        helper.make_node("MatMul", ["encoder_hidden_states", "key"], ["present.0.key"], name="/key/MatMul"),
        helper.make_node("MatMul", ["encoder_hidden_states", "value"], ["present.0.value"], name="/value/MatMul"),
        *_attend("", "present.0.key", "present.0.value"),
        helper.make_node("MatMul", ["y", "head"], ["logits"], name="/head/MatMul"),
    ]
    weights = {"embed": EMBEDDING, **{n: WEIGHTS[n] for n in ("key", "value", *SHARED)}}
    cache: list[str | int] = ["batch", "source", WIDTH]
    return _model(
        "decoder", nodes, {"tokens": ["batch", "target"], "encoder_hidden_states": cache},
        {"logits": ["batch", "target", VOCABULARY], "present.0.key": cache, "present.0.value": cache}, weights,
    )  # fmt: skip


def decoder_with_past() -> onnx.ModelProto:
    """Return next_token [batch, 1] and past_key_values.0.key/value to logits; its head is stored transposed."""
    nodes = [
        helper.make_node("Gather", ["onnx::Gather_9", "next_token"], ["x"], name="/embed/Gather"),
        *_attend("onnx::MatMul_", "past_key_values.0.key", "past_key_values.0.value"),
        helper.make_node("Transpose", ["lm_head.weight"], ["head"], name="/head/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["y", "head"], ["logits"], name="/head/MatMul"),
    ]
    weights = {
        "onnx::Gather_9": EMBEDDING, "onnx::MatMul_query": WEIGHTS["query"], "onnx::MatMul_out": WEIGHTS["out"],
        "lm_head.weight": np.ascontiguousarray(WEIGHTS["head"].T),
    }  # fmt: skip
    cache: list[str | int] = ["batch", "source", WIDTH]
    return _model(
        "decoder_with_past", nodes,
        {"next_token": ["batch", 1], "past_key_values.0.key": cache, "past_key_values.0.value": cache},
        {"logits": ["batch", 1, VOCABULARY]}, weights,
    )  # fmt: skip


def token_feeds(name: str, length: int, seed: int, count: int = 8) -> list[Feeds]:
    """Return feeds of one input of tokens, int64 [2, length]."""
    random = np.random.default_rng(seed)
    return [{name: random.integers(0, VOCABULARY, (2, length))} for _ in range(count)]


def sources() -> dict[str, bytes]:
    """Return the three models, serialized, by name."""
    made = {"encoder": encoder(), "decoder": decoder(), "decoder_with_past": decoder_with_past()}
    return {name: model.SerializeToString() for name, model in made.items()}


def calibration() -> dict[str, list[Feeds]]:
    """Return feeds of the three models without those inputs that come out of another."""
    return {
        "encoder": token_feeds("tokens", SOURCE, 1),
        "decoder": token_feeds("tokens", TARGET, 2),
        "decoder_with_past": token_feeds("next_token", 1, 3),
    }


LINKS = {
    "decoder.encoder_hidden_states": "encoder.last_hidden_state",
    "decoder_with_past.past_key_values.*": "decoder.present.*",
}


def initializers(model: onnx.ModelProto) -> Iterator[Array]:
    """Yield the contents of a model's initializers."""
    return (numpy_helper.to_array(t) for t in model.graph.initializer)
