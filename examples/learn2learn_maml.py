"""Gradient agreement in a learn2learn loop: python examples/learn2learn_maml.py

Four lines make the difference, marked by a comment; without them this is learn2learn's MAML. Any other rule
goes in the place of `GradientAgreement()`.
"""

import learn2learn as l2l
import torch
from torch.nn.functional import mse_loss

import gametalearn as gml
from gametalearn.bridges import GradientCollector  # 1

torch.manual_seed(0)
training, unseen = gml.Sinusoid(seed=0), gml.Sinusoid(seed=1).sample(40)
maml = l2l.algorithms.MAML(gml.MLP(1, 1, hidden=(40, 40)), lr=0.01)
optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
collect = GradientCollector(maml.parameters(), gml.GradientAgreement())  # 2


def query_loss(batch, task):
    learner = maml.clone()
    learner.adapt(mse_loss(learner(batch.support_x[task]), batch.support_y[task]))
    return mse_loss(learner(batch.query_x[task]), batch.query_y[task])


def tested():
    return sum(query_loss(unseen, task).item() for task in range(len(unseen))) / len(unseen)


before = tested()
for _ in range(40):
    batch = training.sample(5)
    optimizer.zero_grad()
    for task in range(len(batch)):
        query_loss(batch, task).backward()
        collect.add()  # 3
    collect.combine()  # 4; it scales like the mean, so nothing is divided by the number of tasks
    optimizer.step()
print(f"squared error on unseen tasks: {before:.2f} before, {tested():.2f} after")
