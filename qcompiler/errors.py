"""The errors that qcompiler raises on purpose, each with what to do next in its text."""

from __future__ import annotations


def innermost(error: BaseException) -> BaseException:
    """Return the error that began a chain of causes: the outer ones only say what was attempted."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's innermost cause, or that one's type where it says nothing."""
    cause = innermost(error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


class QCompilerError(Exception):
    """Base of every error that a user can mend; the command line prints it as one line and exits with 2."""


class ModelError(QCompilerError):
    """A model that cannot be read, or that asks for something no pass can handle."""


class VerifyError(QCompilerError):
    """A graph that breaks a rule of its phase; names the node, its origin and the rule."""


class PassError(QCompilerError):
    """A pass, pipeline string or recipe that is unknown, out of order or failed."""


class TargetError(QCompilerError):
    """A target that is unknown, or that cannot do what was asked of it."""


class CalibrationError(QCompilerError):
    """Calibration or evaluation data that is missing, misnamed, misshapen or not finite."""


class BudgetError(QCompilerError):
    """A bound that is malformed or that no plan can meet."""
