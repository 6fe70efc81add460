"""Own model, data, inner loop, weighting rule, loss and score: python examples/own_parts.py"""

import torch

import gametalearn as gml


class Net(torch.nn.Sequential):  # called with those of the offered arguments that it names
    def __init__(self, input_shape=(4,)):
        super().__init__(torch.nn.Linear(*input_shape, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))


class Tables:  # each task predicts a column of a table from four others
    def __init__(self, seed=0, split="train"):
        self.split, self.random = split, torch.Generator().manual_seed(seed)

    def sample(self, num_tasks):
        x = torch.randn(num_tasks, 15, 4, generator=self.random)
        slopes = torch.randn(num_tasks, 4, 1, generator=self.random)
        y = (x @ (slopes if self.split == "train" else 0.9 * slopes)).tanh()
        return gml.TaskBatch(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])

    def with_seed(self, seed):
        return Tables(seed, self.split)

    def state_dict(self):
        return {"random": self.random.get_state()}

    def load_state_dict(self, state):
        self.random.set_state(state["random"])


class SignDescent(gml.MAML):  # steps by the sign of the gradient
    def adapt(self, meta, loss, gradient):
        for _ in range(self.steps):
            step = gradient(loss, meta)
            meta = {name: p - self.inner_lr * step[name].sign() for name, p in meta.items()}
        return meta


class Clipped(torch.nn.Module):  # gradients longer than the median count less
    def forward(self, gradients):
        length = gradients.rows.norm(dim=1).clamp_min(1e-12)
        weights = (length.median() / length).clamp(max=1) / len(length)
        return gml.Weights(raw=weights, effective=weights)


huber = torch.nn.functional.huber_loss
within = gml.Score("within", lambda p, t: ((p - t).abs() < 0.2).float().mean(), format="percent")
if __name__ == "__main__":
    config = gml.TrainConfig.of("sinusoid", iterations=20, validate_every=10, validation_episodes=9)
    own = {"learner": SignDescent(0.05, 2), "loss": huber, "score": within}
    given = {"source": Tables(), "validation": Tables(1, "val"), **own}
    run = gml.train(config, "runs/own/one", model=Net, rule=Clipped(), **given)
    print(gml.evaluate(run.model, Tables(2, "test"), run.test_learner, loss=huber, score=within))
    given = {"source": Tables, "validation": lambda seed: Tables(seed, "val"), **own}
    given |= {"model": lambda seed: Net(), "test": lambda seed: Tables(seed, "test")}
    rules = {"uniform": "uniform", "clipped": Clipped}
    print(gml.compare(config, rules, seeds=3, episodes=50, out="runs/own/all", **given).table())
