"""Weighting rules: how per-task meta-gradients are combined. One rule, one file, one citation."""

from gametalearn.weighting.agreement import (
    GradientAgreement,
    agreement_weights,
    agreement_weights_from_gramian,
    gramian,
)
from gametalearn.weighting.make import RULES, make_rule
from gametalearn.weighting.uniform import NormControl, Uniform
from gametalearn.weighting.weights import Gradients, Rule, Weights

__all__ = [
    "RULES",
    "GradientAgreement",
    "Gradients",
    "NormControl",
    "Rule",
    "Uniform",
    "Weights",
    "agreement_weights",
    "agreement_weights_from_gramian",
    "gramian",
    "make_rule",
]
