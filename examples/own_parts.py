"""Own model, data, inner loop, weighting rule, loss and metric: python examples/own_parts.py runs/own"""

import sys

import torch

import gametalearn as gml


class Net(torch.nn.Sequential):  # is called with those of the arguments on offer that it names
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


class Clipped(torch.nn.Module):  # no task counts for more because its gradient is longer
    def forward(self, gradients):
        length = gradients.rows.norm(dim=1).clamp_min(1e-12)
        weights = (length.median() / length).clamp(max=1) / len(length)
        return gml.Weights(raw=weights, effective=weights)


huber = torch.nn.functional.huber_loss
within = gml.Score("within", lambda p, t: ((p - t).abs() < 0.2).float().mean(), format="percent")

if __name__ == "__main__":
    config = gml.TrainConfig.of("sinusoid", iterations=60, meta_batch=8, validation_episodes=40)
    own = {"learner": SignDescent(0.05, 2), "loss": huber, "score": within}
    made = {name: lambda seed, split=name: Tables(seed, split) for name in ("train", "val", "test")}
    gml.train(config, f"{sys.argv[1]}/one", model=Net, rule=Clipped(), source=Tables(), **own,
              validation=Tables(1, "val"))  # fmt: skip
    print(gml.compare(config, {"uniform": "uniform", "clipped": Clipped}, 3, 200, sys.argv[1],
                      model=lambda seed: Net(), source=made["train"], validation=made["val"],
                      test=made["test"], **own).table())  # fmt: skip
    run = gml.load_run(f"{sys.argv[1]}/one", model=Net, **own)
    print(gml.evaluate(run.model, Tables(2, "test"), run.test_learner, loss=huber, score=within))
