"""The engine behind `gametalearn.meta_gradients`: exact per-task meta-gradients, fast.

Two methods give the same numbers up to rounding (see `gametalearn.engine.plan` for the choice):

- ``"loop"``: plain autograd, task by task. Any module; the slow oracle.
- ``"replay"``: the computation for a chunk of tasks is written once, with `torch.func.vmap` over the
  tasks and layers of our own below it, traced to a flat list of native kernels, and replayed for
  every chunk and every meta-batch; chunks run on worker threads.
"""
