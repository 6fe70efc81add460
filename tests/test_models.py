import pytest
import torch

from gametalearn.errors import InputError
from gametalearn.models import MLP, Conv4, ResNet12, TaskNorm


@pytest.mark.parametrize("pool", ["stride", "max"])
@pytest.mark.parametrize("norm", ["batch", "support", "group", "none"])
def test_conv4_gives_logits_for_every_norm_and_pool(pool, norm):
    model = Conv4(ways=3, channels=2, image_size=20, hidden=8, pool=pool, norm=norm)
    logits = model(
        torch.rand(4, 2, 20, 20), torch.rand(3, 2, 20, 20) if norm == "support" else None
    )
    assert logits.shape == (4, 3)


def test_conv4_has_the_published_number_of_parameters():
    # Finn et al. 2017, without the conv biases: 3 x 3 filters, a scale and a shift each, the head
    omniglot = 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 5 + 5
    assert sum(p.numel() for p in Conv4(5).parameters()) == omniglot
    imagenet = 9 * 3 * 32 + 3 * 9 * 32 * 32 + 4 * 2 * 32 + 32 * 25 * 5 + 5
    model = Conv4(5, channels=3, image_size=84, hidden=32, pool="max")
    assert sum(p.numel() for p in model.parameters()) == imagenet


def test_task_norm_equals_batch_norm_and_its_support_form_the_formula():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64) * 2 + 1
    norm = TaskNorm(3).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    peer = torch.nn.BatchNorm2d(3, track_running_stats=False).double()
    peer.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), peer(x))
    torch.testing.assert_close(norm(x, 4)[:4], peer(x[:4]))
    mean, var = x[:4].mean((0, 2, 3)), x[:4].var((0, 2, 3), correction=0)
    query = (x[4:] - mean.view(-1, 1, 1)) / (var + 1e-5).sqrt().view(-1, 1, 1)
    query = query * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x, 4)[4:], query)


@pytest.mark.parametrize("norm", ["support", "group", "none"])
def test_inductive_norms_do_not_let_a_query_see_the_others(norm):
    model = Conv4(ways=3, image_size=16, hidden=8, norm=norm).double()
    support, query = torch.rand(3, 1, 16, 16).double(), torch.rand(4, 1, 16, 16).double()
    args = (support,) if model.uses_support else ()
    together = model(query, *args)
    alone = torch.cat([model(query[i : i + 1], *args) for i in range(4)])
    torch.testing.assert_close(together, alone)


def test_input_normalisation_is_the_first_step():
    model = Conv4(3, channels=3, image_size=16, hidden=8, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))
    plain = Conv4(3, channels=3, image_size=16, hidden=8)
    plain.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1, 2])
    torch.testing.assert_close(model(x), plain((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)))


def test_resnet12_and_mlp_shapes():
    assert ResNet12(4, widths=(4, 8, 8, 8))(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert MLP(1, 1)(torch.rand(7, 1)).shape == (7, 1)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="got 'layer'"):
        Conv4(5, norm="layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 'mean'"):
        Conv4(5, pool="mean")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 8"):
        Conv4(5, image_size=8)
