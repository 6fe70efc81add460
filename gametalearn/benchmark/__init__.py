"""``gametalearn bench``: one meta-gradient of gametalearn beside learn2learn's, and their errors.

Model, weights, batch, threads and order of differentiation are the same on both sides. learn2learn
computes the gradient of the query loss task by task, as its users do; gametalearn computes the rows
of every task.

Every side is timed in a process of its own, one process after the other: within one process the
worker threads of one side and the OpenMP threads of the other get in each other's way. One such
process can be started by hand, to take a ratio from two of them without anything in between:

    python -m gametalearn.benchmark --side gametalearn --config omniglot-5w1s --threads 2
    python -m gametalearn.benchmark --side learn2learn --config omniglot-5w1s --threads 2

Each prints one line of JSON, with the median of its timings as ``median_ms``.

The pieces, in the order in which they use each other: `settings` says what is measured, `load` how
busy the machine was, `floor` is the side of convolutions and products alone, `sides` times one side,
`errors` compares rows with a float64 loop, `processes` starts a process for a side, `figures` turns
timings into the fields of the JSON file, `rounds` is the whole measurement, `report` prints and draws
it, `command` is the command line's.
"""

from gametalearn.benchmark.rounds import run_bench, sweep
from gametalearn.benchmark.settings import CONFIGS, Setting

__all__ = ["CONFIGS", "Setting", "run_bench", "sweep"]
