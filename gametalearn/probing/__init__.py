"""One step ahead: what each weighting rule's update gains from the weights that a model has now."""

from gametalearn.probing.found import Probe
from gametalearn.probing.measure import probe
from gametalearn.probing.steps import Step, through

__all__ = ["Probe", "Step", "probe", "through"]
