"""Budgets as text."""

from __future__ import annotations

import pytest

from qcompiler.errors import BudgetError
from qcompiler.search.budget import Budget, parse_budget
from qcompiler.search.problem import Limits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Budget()),
        ([], Budget()),
        ("drop<=0.5pt", Budget(drop_points=0.005)),
        ("drop<=1%", Budget(drop_relative=0.01)),
        ("drop <= .25 PT", Budget(drop_points=0.0025)),
        ("sqnr>=30", Budget(sqnr_db=30.0)),
        ("SQNR >= 30.5 dB", Budget(sqnr_db=30.5)),
        (["drop<=1pt", "drop<=2%", "sqnr>=20"], Budget(0.01, 0.02, 20.0)),
        (["sqnr>=20", "sqnr>=25"], Budget(sqnr_db=25.0)),
        (["sqnr>=25", "sqnr>=20", "drop<=2%", "drop<=1%", "drop<=3%"], Budget(sqnr_db=25.0, drop_relative=0.01)),
        ("bytes<=4MB", Budget(bytes=4_000_000)),
        (" Bytes <= 1.5 mib ", Budget(bytes=1_572_864)),
        ("bytes<=12kB", Budget(bytes=12_000)),
        ("bytes<=.5KiB", Budget(bytes=512)),
        ("bytes<=100", Budget(bytes=100)),
        ("bytes<=1 b", Budget(bytes=1)),
        ("bits<=4.65", Budget(bits=4.65)),
        ("latency<=3ms", Budget(latency_us=3000.0)),
        ("LATENCY <= 250 US", Budget(latency_us=250.0)),
        ("latency<=60%", Budget(latency_share=0.6)),
        (["latency<=60%", "latency<=2ms", "latency<=75 %"], Budget(latency_us=2000.0, latency_share=0.6)),
        ("latency<=250µs", Budget(latency_us=250.0)),
        ("latency<=0.5s", Budget(latency_us=500_000.0)),
        (["bytes<=1MB", "bytes<=1MiB", "bytes<=2MB"], Budget(bytes=1_000_000)),
        (["latency<=1ms", "latency<=900us", "bits<=5", "bits<=4"], Budget(latency_us=900.0, bits=4.0)),
    ],
)
def test_a_budget_is_read(text: str | list[str] | None, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "drop", "drop<=1", "drop>=1pt", "drop<=-1pt", "sqnr<=30", "sqnr>=30%", "sqnr>=30pt", "drop<=x%",
     "drop<=1pt sqnr>=3", "drop<=1e-3pt", "bytes<=0", "bytes<=0.4", "bytes<=-4MB", "bytes<=nan", "bytes>=4MB",
     "bytes<=4MT", "bytes<=4ms", "bits<=0", "bits<=4 MB", "bits>=4", "latency<=0us", "latency<=0%", "latency>=60%",
     "latency<=3", "latency>=3ms", "latency<=inf ms", "latency<=3MB", "bytes<=" + "9" * 400],
)  # fmt: skip
def test_any_other_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(BudgetError, match=r"expected like drop<=0\.5pt, .*, bytes<=4MB, .* or latency<=60%") as caught:
        parse_budget([text])
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "reference", "least"),
    [
        (Budget(), 0.8, None),
        (Budget(sqnr_db=30), 0.8, None),
        (Budget(drop_points=0.01), 0.8, 0.79),
        (Budget(drop_relative=0.01), 0.8, 0.792),
        (Budget(drop_relative=0.01), -3.5, -3.535),  # a loss as a metric: more is better, so it is negative
        (Budget(drop_points=0.01, drop_relative=0.01), 0.8, 0.792),  # the stricter one
        (Budget(drop_points=0.01, drop_relative=0.01), 3.0, 2.99),
    ],
)
def test_the_least_metric_follows_from_that_of_float(budget: Budget, reference: float, least: float | None) -> None:
    assert budget.least_metric(reference) == (None if least is None else pytest.approx(least))


def test_a_share_of_the_latency_becomes_microseconds_beside_float() -> None:
    limits = parse_budget(["latency<=60%", "bytes<=4kB"]).limits()
    assert limits == Limits(bytes=4000, latency_share=0.6)
    assert limits.beside(50.0) == Limits(bytes=4000, latency_us=30.0)
    assert parse_budget(["latency<=60%", "latency<=20us"]).limits().beside(50.0).latency_us == 20.0
    assert parse_budget("latency<=20us").limits().beside(50.0) == Limits(latency_us=20.0)
