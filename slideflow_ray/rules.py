"""Rules for an operating point, by name: youden, f1, sensitivity=, specificity=, cost=, probability=, presets."""

from __future__ import annotations

from fractions import Fraction

from slideflow_ray.errors import ConfigError
from slideflow_ray.metrics import (
    Rule,
    best_f1,
    fixed_probability,
    fixed_sensitivity,
    fixed_specificity,
    least_cost,
    youden,
)

PRESETS = {"004": "probability=0.8", "003": "probability=0.5"}
"""The thresholds of published systems: CAMELYON16 heatmaps (004), tubers in MRI (003)."""

HELP = (
    "youden, f1, sensitivity=0.95, specificity=0.95, cost=5 (missing one costs 5 false alarms), "
    "cost=5,prevalence=0.1, probability=0.5, or a preset: 004 (probability=0.8), 003 (probability=0.5)"
)

_PLAIN: dict[str, Rule] = {"youden": youden, "f1": best_f1}
_WITH_VALUE = {"sensitivity": fixed_sensitivity, "specificity": fixed_specificity, "probability": fixed_probability}


def rule_of(text: str) -> Rule:
    """Return the rule that `text` names. Raises ConfigError."""
    name, _, value = PRESETS.get(text, text).partition("=")
    try:
        if name in _PLAIN and "=" not in text:
            return _PLAIN[name]
        if name in _WITH_VALUE and 0 < float(value) <= 1:
            return _WITH_VALUE[name](value)
        if name == "cost":
            return _cost(value)
    except (ValueError, ZeroDivisionError):
        pass
    raise ConfigError(f"{text!r} is no rule for an operating point.", next_step=f"Use {HELP}.")


def _cost(text: str) -> Rule:
    """`5` or `5,prevalence=0.1`."""
    cost, comma, rest = text.partition(",")
    key, _, prevalence = rest.partition("=")
    if comma and key.strip() != "prevalence":
        raise ValueError(rest)
    for number in (cost, prevalence) if comma else (cost,):
        if not 1e-9 < float(Fraction(number) if "/" in number else number) < 1e9:
            raise ValueError(number)
    return least_cost(cost, prevalence if comma else None)


def fixes_probability(text: str) -> bool:
    """Return whether a rule asks no data: it fixes a probability.

    >>> fixes_probability("004"), fixes_probability("youden")
    (True, False)
    """
    return PRESETS.get(text, text).startswith("probability=")


def written(text: str) -> str:
    """Return a rule as it is recorded: a preset with what it stands for.

    >>> written("004"), written("f1")
    ('004 (probability=0.8)', 'f1')
    """
    return f"{text} ({PRESETS[text]})" if text in PRESETS else text
