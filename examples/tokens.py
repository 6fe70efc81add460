"""A few-shot classifier of short texts, given as integer tokens, in a loop of one's own."""

import torch

import gametalearn as gml

WORDS, LENGTH, PADDING = 120, 12, 0


def texts(classes=80, each=20, seed=0):
    """Four of 60 words make a topic; a text has some of them among 59 words that mean nothing."""
    random = torch.Generator().manual_seed(seed)

    def drawn(count, size):
        return torch.rand(count, size, generator=random).argsort(1)

    labels = torch.arange(classes).repeat_interleave(each)
    topics = 60 + drawn(classes, 60)[:, :4]
    number = torch.randint(4, (len(labels), 6), generator=random)
    said = topics[labels].gather(1, number)
    filler = torch.randint(1, 60, (len(labels), LENGTH - 6), generator=random)
    tokens = torch.cat([said, filler], 1).gather(1, drawn(len(labels), LENGTH))
    length = torch.randint(8, LENGTH + 1, (len(labels), 1), generator=random)
    return tokens.where(torch.arange(LENGTH) < length, PADDING), labels


class Reader(torch.nn.Module):
    """The mean of the words' vectors, and a layer."""

    def __init__(self, ways, size=32):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(WORDS, size), torch.nn.Linear(size, ways)

    def forward(self, tokens):
        there = (tokens != PADDING).unsqueeze(-1)
        return self.head((self.words(tokens) * there).sum(1) / there.sum(1))


def main(iterations=300):
    """Train on 60 topics and test on 20 others; the test before and after."""
    data = gml.ClassExamples.from_tensors(*texts(), name="texts")
    train = gml.EpisodeSampler(data.subset(range(60), "train"), ways=5, shots=5, queries=5)
    test = gml.EpisodeSampler(data.subset(range(60, 80), "test"), ways=5, shots=5, queries=5)
    torch.manual_seed(0)
    model, learner = Reader(ways=5), gml.MAML(inner_lr=1.0, steps=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = gml.evaluate(model, test, learner, episodes=300)
    for batch in gml.TaskLoader(train, num_tasks=8, batches=iterations):
        gradients = gml.meta_gradients(model, batch, learner)
        weights = gml.agreement_weights(gradients.rows)
        gml.apply_update(optimizer, model, weights @ gradients.rows)
    return before, gml.evaluate(model, test, learner, episodes=300)


if __name__ == "__main__":
    print("before {}\nafter  {}".format(*main()))
