"""gametalearn: gradient-based few-shot meta-learning with gradient agreement."""

from gametalearn.episodes import EpisodeSampler, TaskBatch
from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.images import ClassImages

__all__ = ["ClassImages", "EpisodeSampler", "InputError", "TaskBatch", "TaskGradients"]
