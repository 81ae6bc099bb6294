"""The errors that qcompiler raises on purpose, each with what to do next in its text."""

from __future__ import annotations


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
