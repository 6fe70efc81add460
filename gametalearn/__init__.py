"""gametalearn: gradient-based few-shot meta-learning with gradient agreement."""

from gametalearn.adaptation import ANIL, MAML, MetaSGD, Reptile
from gametalearn.episodes import EpisodeSampler, TaskBatch
from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients, meta_gradients
from gametalearn.images import ClassImages
from gametalearn.weighting import (
    RULES,
    GradientAgreement,
    NormControl,
    Uniform,
    Weights,
    agreement_weights,
    agreement_weights_from_gramian,
    make_rule,
)

__all__ = [
    "ANIL",
    "MAML",
    "RULES",
    "ClassImages",
    "EpisodeSampler",
    "GradientAgreement",
    "InputError",
    "MetaSGD",
    "NormControl",
    "Reptile",
    "TaskBatch",
    "TaskGradients",
    "Uniform",
    "Weights",
    "agreement_weights",
    "agreement_weights_from_gramian",
    "make_rule",
    "meta_gradients",
]
