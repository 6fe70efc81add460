"""Gradient agreement in a loop with Hugging Face Accelerate: python examples/accelerate_loop.py

Three data sets share one network, and each step weights their gradients. Run it in one process: with several,
DistributedDataParallel would average the gradients over the processes before the rule sees them.
`pip install accelerate` first.
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import gametalearn as gml
from gametalearn.bridges import GradientCollector

torch.manual_seed(0)
slopes = torch.randn(8, 1)


def data_set(shift):
    x = torch.randn(256, 8)
    return TensorDataset(x, (x @ (slopes + shift * torch.randn(8, 1))).tanh())


accelerator = Accelerator()  # precision and device as `accelerate config` has set them
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
loaders = [DataLoader(data_set(shift), batch_size=32, shuffle=True) for shift in (0.1, 0.2, 0.4)]
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
model, optimizer, *loaders = accelerator.prepare(model, optimizer, *loaders)
collect = GradientCollector(model.parameters(), gml.GradientAgreement())


def losses(batches):
    return [mse_loss(model(x), y) for x, y in batches]


before = sum(losses(map(next, map(iter, loaders)))).item()
for _ in range(5):
    for batches in zip(*loaders, strict=True):
        optimizer.zero_grad()
        for loss in losses(batches):
            accelerator.backward(loss)
            collect.add()
        collect.combine()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
after = sum(losses(map(next, map(iter, loaders)))).item()
print(f"sum of losses: {before:.3f} before, {after:.3f} after")
