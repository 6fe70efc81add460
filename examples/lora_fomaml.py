"""First-order MAML of low-rank adapters in a frozen transformer: python examples/lora_fomaml.py

What does not require gradients stays as it is: MAML trains and adapts nothing but the adapters.
"""

import torch
from torch import nn

import gametalearn as gml


class Transformer(nn.Module):
    def __init__(self, length=8, width=32):
        super().__init__()
        self.embed, self.place = nn.Linear(1, width), nn.Parameter(torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x):  # (B, length) to (B, 1)
        return self.head(self.layer(self.embed(x[:, :, None]) + self.place).mean(1))


class LowRank(nn.Module):  # LoRA (Hu et al. 2021, arXiv 2106.09685): W x + B A x, B = 0 at first
    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer, self.a = layer, nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Parameter(torch.zeros(rank, layer.out_features))

    def forward(self, x):
        return self.layer(x) + self.a(x) @ self.b


def windows(*shape, unit=1.0):  # eight values of a sine, and the one that follows
    time = torch.arange(9) * (0.2 + torch.rand(*shape, 1)) + 6.3 * torch.rand(*shape, 1)
    return time.sin()[..., :8], unit * time.sin()[..., 8:]


def tasks(count):  # each task measures what follows in a unit of its own, from -2 to 2
    x, y = windows(count, 20, unit=4 * torch.rand(count, 1, 1) - 2)
    return gml.TaskBatch(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:], torch.zeros(count).long())


torch.manual_seed(0)
net = Transformer()
optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
for _ in range(150):
    x, y = windows(64)
    optimizer.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    optimizer.step()
net.requires_grad_(False)
net.layer.linear1, net.layer.linear2 = LowRank(net.layer.linear1), LowRank(net.layer.linear2)
optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.003)
learner, unseen = gml.MAML(inner_lr=0.3, steps=3, first_order=True), tasks(100)
before = gml.meta_gradients(net, unseen, learner).loss.mean()
for _ in range(30):
    found = gml.meta_gradients(net, tasks(8), learner)  # .rows: (8, P), P numbers in the adapters
    gml.apply_update(optimizer, net, gml.Uniform()(found).effective @ found.rows)
after = gml.meta_gradients(net, unseen, learner).loss.mean()
print(f"squared error on unseen tasks: {before:.3f} before, {after:.3f} after")
