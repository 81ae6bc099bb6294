"""Feeds that come out of another graph: what the producer's float model gives, sample by sample."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qcompiler
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.feed_source import FeedSource
from qcompiler.engine import EngineOptions, Feeds
from qcompiler.links import link_graphs, parse_link
from qcompiler.options import Options
from tests.together.models import LINKS, TARGET, calibration, sources, token_feeds


def linked(links: dict[str, str] = LINKS, **changes: object) -> dict[str, Options]:
    feeds = {**calibration(), **changes}
    return link_graphs(sources(), {n: Options(calibration=feeds[n]) for n in sources()}, links)  # type: ignore[arg-type]


def test_linked_inputs_are_what_the_float_producers_give_for_the_same_sample():
    options = linked()
    engine = EngineOptions(optimize=False)
    encoder, decoder = (OrtEngine().load(sources()[n], engine) for n in ("encoder", "decoder"))
    given = calibration()
    assert isinstance(options["decoder_with_past"].calibration, FeedSource)
    made = list(options["decoder_with_past"].calibration)
    assert len(made) == len(given["encoder"])
    for index, feed in enumerate(made):
        hidden = encoder.run(given["encoder"][index])["last_hidden_state"]
        cache = decoder.run({**given["decoder"][index], "encoder_hidden_states": hidden})
        np.testing.assert_array_equal(feed["next_token"], given["decoder_with_past"][index]["next_token"])
        np.testing.assert_array_equal(feed["past_key_values.0.key"], cache["present.0.key"])
        np.testing.assert_array_equal(feed["past_key_values.0.value"], cache["present.0.value"])
    assert not isinstance(options["encoder"].calibration, FeedSource)  # nothing is linked into it


def test_feeds_are_read_one_at_a_time_and_each_producer_runs_once_per_sample():
    read: list[int] = []

    def tokens() -> Iterator[Feeds]:
        for index, feed in enumerate(calibration()["encoder"]):
            read.append(index)
            yield feed

    options = linked(encoder=tokens)
    assert isinstance(options["decoder"].calibration, FeedSource)
    walk = iter(options["decoder"].calibration)
    next(walk)
    assert max(read) <= 1
    assert len(list(options["decoder"].calibration)) == 8
    before = len(read)
    assert len(list(options["decoder"].calibration)) == 8
    assert len(read) == before  # what was computed waits in a file


def test_an_input_that_the_feeds_have_is_taken_from_them():
    hidden = np.ones((2, 7, 64), np.float32)
    whole = [{**feed, "encoder_hidden_states": hidden} for feed in calibration()["decoder"]]
    options = linked(decoder=whole)
    assert isinstance(options["decoder"].calibration, FeedSource)
    assert all((feed["encoder_hidden_states"] == 1).all() for feed in options["decoder"].calibration)


def test_evaluation_feeds_are_completed_as_well():
    options = {n: Options(calibration=f, evaluation=f[:3]) for n, f in calibration().items()}
    made = link_graphs(sources(), options, LINKS)
    assert isinstance(made["decoder"].evaluation, FeedSource)
    assert len(list(made["decoder"].evaluation)) == 3


def test_a_graph_whose_inputs_are_all_linked_needs_no_feeds():
    value = helper.make_tensor_value_info
    head = helper.make_graph(
        [helper.make_node("Neg", ["states"], ["y"])], "head", [value("states", TensorProto.FLOAT, ["b", "s", 64])],
        [value("y", TensorProto.FLOAT, ["b", "s", 64])],
    )  # fmt: skip
    model = helper.make_model(head, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    models = {"encoder": sources()["encoder"], "head": model.SerializeToString()}
    options = {"encoder": Options(calibration=calibration()["encoder"]), "head": Options()}
    made = link_graphs(models, options, {"head.states": "encoder.last_hidden_state"})
    assert isinstance(made["head"].calibration, FeedSource)
    assert [sorted(feed) for feed in made["head"].calibration] == [["states"]] * 8


def double(name: str) -> bytes:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], name, [value("x", TensorProto.DOUBLE, ["b", 4])],
        [value("y", TensorProto.DOUBLE, ["b", 4])],
    )  # fmt: skip
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return made


@pytest.mark.parametrize(
    ("links", "text"),
    [
        ({"decoder.hidden": "encoder.last_hidden_state"}, "decoder has no input 'hidden'; its inputs are: tokens, enc"),
        ({"decoder.encoder_hidden_states": "encoder.states"}, "encoder has no output 'states'; its outputs are: last"),
        ({"past.*": "decoder.present.*"}, "'past.*' names no graph of this build"),
        (
            {"decoder.tokens": "encoder.last_hidden_state"},
            r"encoder.last_hidden_state is float32['batch', 'source', 64], but decoder.tokens takes int64['batch', 'ta",
        ),
        (
            {"decoder.encoder_hidden_states": "decoder_with_past.logits"},
            "decoder_with_past.logits is float32['batch', 1, 96], but decoder.encoder_hidden_states takes float32[",
        ),
        (
            {"decoder_with_past.past_*": "decoder.present_*"},
            "decoder has no output 'present_key_values.0.key'; its outputs are: logits, present.0.key",
        ),
        ({**LINKS, "decoder.encoder_hidden_*": "encoder.last_hidden_state"}, "hidden_states has a link already"),
        (
            {"decoder.encoder_hidden_states": "decoder.present.0.key"},
            "links go round in a circle: decoder <- decoder",
        ),
    ],
)  # fmt: skip
def test_a_link_that_does_not_fit_is_one_error(links: dict[str, str], text: str):
    with pytest.raises(qcompiler.CalibrationError, match=re.escape(text)):
        linked(links)


def test_a_circle_over_two_graphs_is_named():
    models = {"a": double("a"), "b": double("b")}
    feeds = {n: Options(calibration=[{"x": np.zeros((1, 4))}]) for n in models}
    with pytest.raises(qcompiler.CalibrationError, match=r"circle: a <- b <- a; give feeds"):
        link_graphs(models, feeds, {"a.x": "b.y", "b.x": "a.y"})


def test_other_counts_of_feeds_and_missing_feeds_are_errors_that_name_the_graph():
    with pytest.raises(qcompiler.CalibrationError, match="it has fewer feeds than encoder"):
        list(linked(decoder=token_feeds("tokens", TARGET, 2, 5))["decoder"].calibration)  # type: ignore[arg-type]
    with pytest.raises(qcompiler.CalibrationError, match="decoder: a link needs calibration feeds of this graph"):
        linked(decoder=None)
    with pytest.raises(qcompiler.CalibrationError, match="decoder: sample 0: the model has no input 'token'"):
        linked(decoder=token_feeds("token", TARGET, 2))


def test_links_are_read_from_texts_and_graph_names_may_hold_dots():
    assert parse_link("a.b.x=a.y.z", ["a", "a.b"]) == ("a.b.x", "a.y.z")
    for text in ("decoder.x", "=encoder.y", "decoder.x=", "decoder=encoder.y"):
        with pytest.raises(qcompiler.CalibrationError, match="link"):
            parse_link(text, ["decoder", "encoder"])
    assert onnx.load_model_from_string(double("a")).graph.name == "a"
