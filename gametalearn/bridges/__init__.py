"""Weighting rules in other people's loops and libraries.

`plain` and `streaming` need torch alone. `learn2learn` and `torchjd` are bridges to the libraries
of these names; import them by module, so that neither library is needed otherwise.
"""

from gametalearn.bridges.plain import GradientCollector
from gametalearn.bridges.streaming import stream_agreement

__all__ = ["GradientCollector", "stream_agreement"]
