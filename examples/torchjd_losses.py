"""Gradient agreement beside TorchJD's own aggregators, in its loop: python examples/torchjd_losses.py

One network has four losses. `AgreementWeighting` is a weighting like TorchJD's `UPGradWeighting`, and goes
wherever one of those does.
"""

import torch
from torch.nn.functional import mse_loss
from torchjd.aggregation import GramianWeightedAggregator, Mean, UPGrad
from torchjd.autojac import backward, jac_to_grad

from gametalearn.bridges.torchjd import AgreementWeighting

AGGREGATORS = {
    "mean": Mean(),
    "agreement": GramianWeightedAggregator(AgreementWeighting()),
    "UPGrad": UPGrad(),
}

torch.manual_seed(0)
x = torch.randn(200, 8)
y = (x @ torch.randn(8, 4)).tanh()  # four targets, and a loss for each
for name, aggregator in AGGREGATORS.items():
    torch.manual_seed(1)  # the same initial weights for each
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = mse_loss(model(x), y).item()
    for _ in range(100):
        optimizer.zero_grad()
        prediction = model(x)
        backward([mse_loss(prediction[:, k], y[:, k]) for k in range(4)])
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
    print(f"{name}: mean loss {before:.3f} before, {mse_loss(model(x), y).item():.3f} after")
