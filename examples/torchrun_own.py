"""One run in several processes: torchrun --nproc-per-node 2 examples/torchrun_own.py

Every process draws the same episodes and computes its share of each meta-batch. Rank 0 writes the files.
`python examples/torchrun_own.py` is the same run in one process. Where all parts are built in, no program is
needed: `torchrun --nproc-per-node 2 -m gametalearn train ...` does it.
"""

import torch

import gametalearn as gml
from gametalearn.distributed import joined


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(1, 40), torch.nn.SiLU(), torch.nn.Linear(40, 1))


config = gml.TrainConfig.of("sinusoid", rule="agreement", iterations=20, validate_every=10)
with joined() as team:  # gloo on CPUs, NCCL on GPUs
    run = gml.train(config, "runs/shared", model=Net, team=team)
    result = gml.evaluate(run.model, gml.Sinusoid(seed=7), run.test_learner, 100, team=team)
    if team.first:
        print(f"{team.size} process(es): {result}")
