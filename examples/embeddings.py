"""A few-shot classifier over precomputed embeddings: python examples/embeddings.py runs/embeddings"""

import sys

import torch

import gametalearn as gml


def embeddings(classes=80, each=20, size=32, seed=0):
    """As an encoder might give them: 8 directions tell the classes apart, 24 louder ones do not."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    means = torch.randn(classes, 8, generator=random)[labels]
    told = means + 0.5 * torch.randn(len(labels), 8, generator=random)
    rest = 2 * torch.randn(len(labels), size - 8, generator=random)
    turned = torch.linalg.qr(torch.randn(size, size, generator=random)).Q
    return torch.cat([told, rest], 1) @ turned, labels


def noisy(x):
    """Augmentation: other noise in each episode, and the same again from the same seed."""
    return x + 0.1 * torch.randn_like(x)


def main(out=None, iterations=300):
    """Train on 50 classes, validate on 10, and test on 20 others; the test before and after."""
    data = gml.ClassExamples.from_tensors(*embeddings(), name="embeddings")
    splits = {"train": range(50), "val": range(50, 60), "test": range(60, 80)}
    train, val, test = (
        gml.EpisodeSampler(data.subset(classes, split), ways=5, shots=1, queries=5, seed=seed,
                           transform=noisy if split == "train" else None)
        for seed, (split, classes) in enumerate(splits.items())
    )  # fmt: skip
    config = gml.TrainConfig.of(
        ways=5, shots=1, queries=5, model="mlp", hidden=64, inner_lr=0.1, inner_steps=3,
        iterations=iterations, meta_batch=8, meta_lr=3e-3, validation_episodes=100,
    )  # fmt: skip
    run = gml.train(config, out, source=train, validation=val, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = gml.MLP(32, 5, (64, 64))
    before = gml.evaluate(untrained, test, run.test_learner, episodes=300, seed=1)
    after = gml.evaluate(run.model, test, run.test_learner, meta=run.meta, episodes=300, seed=1)
    return before, after


if __name__ == "__main__":
    print("before {}\nafter  {}".format(*main(*sys.argv[1:])))
