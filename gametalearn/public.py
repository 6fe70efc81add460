"""The names that ``gametalearn`` exports; importing them imports torch."""

from gametalearn.adaptation import ANIL, LSLR, MAML, MetaSGD, Reptile
from gametalearn.comparison import compare
from gametalearn.config import TrainConfig
from gametalearn.data import load_dataset
from gametalearn.data.sinusoid import Sinusoid
from gametalearn.diagnostics import Diagnostics, diagnose
from gametalearn.disagreement import Disagreement
from gametalearn.engine.allocator import keep_memory
from gametalearn.engine.making import clear_programs
from gametalearn.episodes import EpisodeSampler, TaskBatch
from gametalearn.errors import InputError
from gametalearn.evaluation import Evaluation, adapt, evaluate
from gametalearn.examples import ClassExamples, ClassItems
from gametalearn.gradients import TaskGradients, meta_gradients
from gametalearn.images import ClassImages
from gametalearn.loader import TaskLoader
from gametalearn.metrics import read_metrics
from gametalearn.mixture import MixedSource
from gametalearn.models import MLP, Conv4, ResNet12
from gametalearn.probing import Probe, probe
from gametalearn.prototypes import ProtoMAML, ProtoNet
from gametalearn.results import Comparison
from gametalearn.run import Run
from gametalearn.runfolder import load_run
from gametalearn.scores import SCORES, Score
from gametalearn.training import train
from gametalearn.update import apply_update
from gametalearn.weighting import (
    RULES,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    GeometricMedian,
    GradientAgreement,
    GradNorm,
    NormalizedMean,
    NormControl,
    ScreenedMean,
    UncertaintyWeighting,
    Uniform,
    Weights,
    agreement_weights,
    agreement_weights_from_gramian,
    make_rule,
    shared_columns,
)

__all__ = [
    "ANIL",
    "LSLR",
    "MAML",
    "MLP",
    "RULES",
    "SCORES",
    "ClassExamples",
    "ClassImages",
    "ClassItems",
    "Comparison",
    "Conv4",
    "Diagnostics",
    "Disagreement",
    "DynamicTaskPrioritization",
    "DynamicWeightAverage",
    "EpisodeSampler",
    "Evaluation",
    "GeometricMedian",
    "GradNorm",
    "GradientAgreement",
    "InputError",
    "MetaSGD",
    "MixedSource",
    "NormControl",
    "NormalizedMean",
    "Probe",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "ResNet12",
    "Run",
    "Score",
    "ScreenedMean",
    "Sinusoid",
    "TaskBatch",
    "TaskGradients",
    "TaskLoader",
    "TrainConfig",
    "UncertaintyWeighting",
    "Uniform",
    "Weights",
    "adapt",
    "agreement_weights",
    "agreement_weights_from_gramian",
    "apply_update",
    "clear_programs",
    "compare",
    "diagnose",
    "evaluate",
    "keep_memory",
    "load_dataset",
    "load_run",
    "make_rule",
    "meta_gradients",
    "probe",
    "read_metrics",
    "shared_columns",
    "train",
]
