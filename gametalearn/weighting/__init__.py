"""Weighting rules: how per-task meta-gradients are combined. One rule, one file, one citation."""

from gametalearn.weighting.agreement import (
    GradientAgreement,
    agreement_weights,
    agreement_weights_from_gramian,
)
from gametalearn.weighting.dtp import DynamicTaskPrioritization
from gametalearn.weighting.dwa import DynamicWeightAverage
from gametalearn.weighting.geometric_median import GeometricMedian, geometric_median_weights
from gametalearn.weighting.gradnorm import GradNorm, shared_columns
from gametalearn.weighting.make import RULES, make_rule, rule_options
from gametalearn.weighting.normalized_mean import NormalizedMean
from gametalearn.weighting.screened_mean import ScreenedMean
from gametalearn.weighting.sharded import Processes, ShardedGradients, ShardedRule
from gametalearn.weighting.uncertainty import UncertaintyWeighting
from gametalearn.weighting.uniform import NormControl, Uniform
from gametalearn.weighting.vectors import gramian
from gametalearn.weighting.weights import Gradients, Rule, Weights

__all__ = [
    "RULES",
    "DynamicTaskPrioritization",
    "DynamicWeightAverage",
    "GeometricMedian",
    "GradNorm",
    "GradientAgreement",
    "Gradients",
    "NormControl",
    "NormalizedMean",
    "Processes",
    "Rule",
    "ScreenedMean",
    "ShardedGradients",
    "ShardedRule",
    "UncertaintyWeighting",
    "Uniform",
    "Weights",
    "agreement_weights",
    "agreement_weights_from_gramian",
    "geometric_median_weights",
    "gramian",
    "make_rule",
    "rule_options",
    "shared_columns",
]
