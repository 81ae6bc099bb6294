"""All rules there are, for ``qcompiler patterns``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qcompiler.patterns.activations import ACTIVATIONS, GELU, SILU_RULES
from qcompiler.patterns.affine import BATCH_NORMS, FACTORS
from qcompiler.patterns.casts import CASTS
from qcompiler.patterns.focus import FOCUS_RULES
from qcompiler.patterns.gemm import GEMM, MATMUL_ADD, OPERAND_ORDER
from qcompiler.patterns.identities import IDENTITIES
from qcompiler.patterns.language import Rule
from qcompiler.patterns.norms import NORMS
from qcompiler.patterns.padding import PADDING
from qcompiler.patterns.qdq import FUSE_RULES
from qcompiler.patterns.reshapes import RESHAPES
from qcompiler.patterns.scales import SCALES
from qcompiler.patterns.shape_arithmetic import SHAPE_ARITHMETIC
from qcompiler.patterns.transposes import TRANSPOSES
from qcompiler.patterns.traps import FLOAT_WEIGHT, QUICK_GELU, TRAP_RULES
from qcompiler.plugins import RULES, Offer, offers, taken


def all_rules() -> tuple[Rule, ...]:
    """Return every shipped rule, by family."""
    return (
        *IDENTITIES,
        *CASTS,
        *RESHAPES,
        *SHAPE_ARITHMETIC,
        *TRANSPOSES,
        *ACTIVATIONS,
        *PADDING,
        *FOCUS_RULES,
        *BATCH_NORMS,
        *GEMM,
        *MATMUL_ADD,
        *FACTORS,
        *OPERAND_ORDER,
        *NORMS,
        *GELU,
        *SILU_RULES,
        *SCALES,
        *FUSE_RULES,
        *(rule for rules in TRAP_RULES.values() for rule in rules),
        QUICK_GELU,
        FLOAT_WEIGHT,
    )


@dataclass(frozen=True)
class OfferedRules:
    """Rules of another package.

    Attributes:
        offer: whose they are.
        rules: tried behind those of the pass that the offer is named after.
    """

    offer: Offer
    rules: tuple[Rule, ...]

    @property
    def pass_name(self) -> str:
        """Return the pass that tries them."""
        return self.offer.name


def load_rules(offer: Offer) -> OfferedRules:
    """Load the rules of an offer.

    Raises:
        PluginError: they cannot be loaded, are no rules, or one has the name of another rule.
    """
    loaded = offer.load()
    rules = tuple(loaded) if isinstance(loaded, Sequence) else (loaded,)
    if wrong := [r for r in rules if not isinstance(r, Rule)]:
        raise offer.error(f"holds a {type(wrong[0]).__name__}: expected a rule, or a sequence of rules")
    names = {r.name: "qcompiler itself" for r in all_rules()}
    for made in rules:
        if made.name in names:
            raise offer.error(f"holds the rule {made.name}, a name that {names[made.name]} has already; rename it")
        names[made.name] = "the same package"
    return OfferedRules(offer, rules)


def offered_rules(pass_name: str) -> tuple[Rule, ...]:
    """Return the rules that installed packages offer for a pass.

    Raises:
        PluginError: what is offered for this pass cannot be used; names the package.
    """
    found = tuple(offer for offer in offers(RULES) if offer.name == pass_name)
    return _together(found, tuple(sys.path)) if found else ()


@lru_cache(maxsize=64)
def _together(found: tuple[Offer, ...], path: tuple[str, ...]) -> tuple[Rule, ...]:
    """Return the rules of several offers; a search path is part of what an entry point means."""
    owner: dict[str, Offer] = {}
    together: list[Rule] = []
    for each in map(load_rules, found):
        for made in each.rules:
            if made.name in owner:
                raise taken(each.offer, f"(with its rule {made.name}) {owner[made.name].source}")
            owner[made.name] = each.offer
            together.append(made)
    return tuple(together)
