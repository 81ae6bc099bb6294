import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.errors import PassError
from qcompiler.pipeline.parse import option_infos, print_pass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.registry import PassRegistry
from tests.pipeline.sample_passes import REGISTRY, DropIdentity, ManyOptions, NeedsFormat, ScaleFactors

FINITE = st.floats(allow_nan=False)
EITHER = st.one_of(st.none(), st.booleans(), st.integers(), FINITE, st.text())
MANY = st.builds(
    ManyOptions,
    flag=st.booleans(),
    count=st.integers(min_value=0),
    ratio=FINITE,
    label=st.text(),
    limit=st.none() | st.integers(),
    either=EITHER,
    mode=st.sampled_from(["min-max", "percentile"]),
    names=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.lists(st.integers()).map(tuple)).map(tuple),
)
PASSES = st.one_of(
    MANY,
    st.just(DropIdentity()),
    st.builds(NeedsFormat, st.text()),
    st.builds(ScaleFactors, FINITE, st.none() | st.text()),
)


@given(st.lists(PASSES, max_size=4).map(tuple))
def test_every_pipeline_reads_back_from_its_text(passes: tuple[ManyOptions, ...]) -> None:
    pipeline = Pipeline(passes)
    again = Pipeline.parse(str(pipeline), REGISTRY)
    assert again == pipeline
    assert str(again) == str(pipeline)
    for first, second in zip(pipeline, again, strict=True):
        assert [type(v) for v in vars(first).values()] == [type(v) for v in vars(second).values()]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ManyOptions(), "many"),
        (ManyOptions(flag=False, count=7), "many{flag=false,count=7}"),
        (ManyOptions(ratio=0.25, limit=3), "many{ratio=0.25,limit=3}"),
        (ManyOptions(label="a b"), 'many{label="a b"}'),
        (ManyOptions(label="none"), 'many{label="none"}'),
        (ManyOptions(label="layer/*/conv"), "many{label=layer/*/conv}"),
        (ManyOptions(either=True), "many{either=true}"),
        (ManyOptions(either="1"), 'many{either="1"}'),
        (ManyOptions(names=("x", "y;z")), 'many{names=[x;"y;z"]}'),
        (ManyOptions(sizes=((1, 2), ())), "many{sizes=[[1;2];[]]}"),
        (ManyOptions(ratio=math.inf), "many{ratio=inf}"),
        (NeedsFormat("int8"), "needs-format{format=int8}"),
    ],
)
def test_only_options_off_their_default_are_printed(value: ManyOptions, text: str) -> None:
    assert print_pass(value) == text


def test_blanks_do_not_matter() -> None:
    text = ' drop-identity ,\n many { count = 4 , names = [ a ; "b" ] } '
    assert Pipeline.parse(text, REGISTRY) == Pipeline((DropIdentity(), ManyOptions(count=4, names=("a", "b"))))
    assert Pipeline.parse("  ", REGISTRY) == Pipeline()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop-identty", r"unknown pass 'drop-identty'; did you mean drop-identity\?"),
        ("zzzzz", r"unknown pass 'zzzzz'; known: ask-range, break-graph, drop-identity,"),
        ("many{cuont=1}", r"pass many has no option 'cuont'; did you mean count\?"),
        ("drop-identity{x=1}", r"pass drop-identity has no options, found 'x'"),
        ("many{count=x}", r"pass many: option count expects int, found x"),
        ("many{count=1.5}", r"option count expects int, found 1\.5"),
        ('many{flag="true"}', r'option flag expects true or false, found "true"'),
        ("many{limit=x}", r"option limit expects int or none, found x"),
        ("many{mode=mean}", r"option mode expects min-max or percentile, found mean"),
        ("many{names=a}", r"option names expects list of text, found a"),
        ("many{sizes=[1;2]}", r"option sizes expects list of list of int, found \[1;2\]"),
        ("many{count=1,count=2}", r"option count is given twice"),
        ("many{count=-1}", r"pass many: count is at least 0, found -1"),
        ("needs-format", r"pass needs-format needs option format; write needs-format\{format=\.\.\.\}"),
        ("many,", r"expected the name of a pass at position 5, found the end"),
        ("many many", r"expected ',' or '\{' at position 5, found 'm'"),
        ("many{", r"expected an option of many at position 5, found the end"),
        ("many{count}", r"expected '=' after option count at position 10, found '\}'"),
        ("many{count=1", r"expected ',' or '\}' at position 12, found the end"),
        ("many{count=}", r"expected a value at position 11, found '\}'"),
        ("many{names=[a,b]}", r"expected ';' or '\]' at position 13, found ','"),
        ('many{label="a}', r"expected a complete JSON string at position 11"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text, REGISTRY)


def test_options_are_described() -> None:
    found = {info.name: (info.type, info.default) for info in option_infos(ManyOptions)}
    assert found == {
        "flag": ("true or false", "true"),
        "count": ("int", "3"),
        "ratio": ("float", "0.5"),
        "label": ("text", "plain"),
        "limit": ("int or none", "none"),
        "either": ("true or false or int or float or text or none", "none"),
        "mode": ("min-max or percentile", "min-max"),
        "names": ("list of text", "[]"),
        "sizes": ("list of list of int", "[]"),
    }
    assert option_infos(NeedsFormat)[0].default is None


def test_an_option_without_text_form_is_refused() -> None:
    @dataclass(frozen=True)
    class HoldsBytes(DropIdentity):
        data: bytes = b""

    with pytest.raises(PassError, match="an option of type bytes has no text form"):
        print_pass(HoldsBytes(b"x"))
    with pytest.raises(PassError, match="option data expects bytes, found x"):
        Pipeline.parse("holds-bytes{data=x}", PassRegistry((HoldsBytes,)))
