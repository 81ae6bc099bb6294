"""What is told of another package's error: its innermost cause, in one line."""

import pytest

from qcompiler.errors import first_line, innermost


def chained(inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise ValueError("while doing this") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("k"), "'k'"),
        (ValueError("  first\nsecond "), "first"),
        (ValueError(" \n"), "ValueError"),
        (LookupError(), "LookupError"),
    ],
)
def test_the_first_line_of_the_innermost_cause_is_told(error: Exception, line: str) -> None:
    assert first_line(error) == line
    outer = chained(error)
    assert innermost(outer) is error
    assert first_line(outer) == line


def test_an_error_that_was_only_handled_meanwhile_is_no_cause() -> None:
    error = ValueError("own")
    error.__context__ = KeyError("handled")
    assert first_line(error) == "own"
