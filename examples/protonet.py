"""Gradient agreement in a prototypical network's training loop: python examples/protonet.py

The loop is plain PyTorch. Each episode of a step is a task, with a gradient of its own, and the rule decides
how the gradients are combined.
"""

import torch
from torch.nn.functional import cross_entropy

import gametalearn as gml
from gametalearn.bridges import GradientCollector

torch.manual_seed(0)
training = gml.EpisodeSampler(gml.load_dataset("glyphs", "train"), ways=5, shots=1, queries=5)
unseen = gml.EpisodeSampler(gml.load_dataset("glyphs", "test"), ways=5, shots=1, queries=5)
embed = gml.Conv4(ways=None, hidden=32)  # without an output layer: its outputs are features
optimizer = torch.optim.Adam(embed.parameters(), lr=0.003)
collect = GradientCollector(embed.parameters(), gml.GradientAgreement())


def prototypical_loss(support_x, support_y, query_x, query_y):
    features, ways = embed(support_x), int(support_y.max()) + 1
    centres = torch.stack([features[support_y == k].mean(0) for k in range(ways)])
    distances = torch.cdist(embed(query_x).flatten(1), centres.flatten(1)) ** 2
    return cross_entropy(-distances, query_y)


def tested():
    return gml.evaluate(embed, unseen, gml.ProtoNet(), episodes=100).mean


before = tested()
for _ in range(30):
    batch = training.sample(4)
    optimizer.zero_grad()
    for task in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        prototypical_loss(*task).backward()
        collect.add()
    weights = collect.combine()
    optimizer.step()
print("weights in the last step:", [round(w, 2) for w in weights.effective.tolist()])
print(f"accuracy on unseen scripts: {before:.1%} before, {tested():.1%} after")
