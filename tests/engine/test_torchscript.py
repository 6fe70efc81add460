"""A script computes what its program computes, to the last bit, or there is none."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gametalearn import MAML, TaskBatch
from gametalearn.adaptation import default_loss, default_score, model_parameters
from gametalearn.engine.making import program_for
from gametalearn.engine.program import Program
from gametalearn.engine.quantities import GRADIENTS, SCORES, Quantities
from gametalearn.engine.replay import chunks_of, program_inputs
from gametalearn.engine.task import Recipe, data_of
from gametalearn.engine.torchscript import script_of
from gametalearn.models import Conv4

aten = torch.ops.aten


def every_kind_of_argument(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    first, second = aten.split.Tensor(x, 2)
    grown = aten.new_full.default(x, [2, 3], float("-inf"), dtype=torch.float64)
    zeros = aten.zeros.default([2, 3], device=torch.device("cpu"), dtype=x.dtype)
    aten.add_.Tensor(zeros, second, alpha=-2)  # in place
    out = torch.empty_like(zeros)
    aten.addcmul.out(zeros, first, second, value=0.1, out=out)
    values, places = aten.max.dim(x, 1, True)
    laid = aten.clone.default(
        first.view(1, 2, 3, 1).expand(2, 2, 3, 4), memory_format=torch.channels_last
    )
    return (
        aten.index.Tensor(x, [None, index]),
        aten.clamp.default(x, None, 0.5),
        aten.clamp.default(x, 1e-7, 7),
        aten.sum.dim_IntList(x, [0, -1], dtype=torch.float64),
        aten.gelu.default(aten.leaky_relu.default(x, 2), approximate="tanh"),
        aten.mean.dim(x, []),
        grown.to(x.dtype) * zeros,
        out,
        values,
        places,
        laid,
        aten.upsample_nearest2d.vec(laid, None, [2, 2]),
    )


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def test_every_kind_of_argument() -> None:
    index = torch.tensor([2, 0])
    script = script_of(every_kind_of_argument, (), (torch.randn(4, 3), index))
    assert script is not None
    x = torch.randn(4, 3)
    x[1, 1] = float("nan")
    with torch.inference_mode():
        assert equal(script(x, index + 0), every_kind_of_argument(x, index))


def test_constants_are_arguments_too() -> None:
    scale = torch.full((3,), 2.0)
    script = script_of(lambda x: (x * scale,), [scale], [torch.ones(3)])
    assert script is not None
    assert torch.equal(script(torch.arange(3.0))[0], torch.tensor([0.0, 2.0, 4.0]))


@pytest.mark.parametrize(
    "program",
    [
        lambda x: (x * x.sum().item(),),  # a number that depends on data
        lambda x: (x * torch.tensor([2.0, 3.0]),),  # a tensor from elsewhere
        lambda x: (torch.rand_like(x),),  # other results the second time
        lambda x: (torch.complex(x, x) * 1j,),  # an argument of a strange type
    ],
    ids=["item", "elsewhere", "random", "complex"],
)
def test_what_does_not_fit_has_no_script(program: Any) -> None:
    assert script_of(program, (), [torch.rand(2)]) is None


def program_of(
    model: nn.Module, batch: TaskBatch, chunk: int, quantities: Quantities
) -> tuple[Program, Any]:
    meta = model_parameters(model)
    chunks = chunks_of(data_of(batch), chunk)
    recipe = Recipe(model, MAML(0.3, 2), default_loss, default_score)
    program = program_for(quantities, recipe, meta, chunks[0]).program
    assert program is not None
    inputs = program_inputs(model, meta)
    return program, [(*inputs, *chunk) for chunk in chunks]


@pytest.mark.parametrize("quantities", [GRADIENTS, SCORES], ids=["gradients", "scores"])
@pytest.mark.parametrize("pool", ["stride", "max"])
@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.slow)])
def test_scripts_of_networks_on_threads(quantities: Quantities, pool: Any, norm: Any) -> None:
    torch.manual_seed(0)
    model = Conv4(3, image_size=16, hidden=4, pool=pool, norm=norm)
    y = torch.arange(3).repeat(8, 2)
    x, z = torch.randn(2, 8, 6, 1, 16, 16).unbind()
    batch = TaskBatch(x, y, z, y, torch.zeros(8, dtype=torch.int64))
    program, inputs = program_of(model, batch, 2, quantities)
    assert program.script is not None

    def run(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return program(*arguments)

    with ThreadPoolExecutor(2) as pool_of_threads:
        got = list(pool_of_threads.map(run, inputs))
    with torch.inference_mode():
        for arguments, results in zip(inputs, got, strict=True):
            assert equal(results, program.module(*arguments))
    assert torch._C._get_graph_executor_optimize()  # the user's own scripts are optimised still


def test_evaluation_is_training_without_its_backward_pass() -> None:
    torch.manual_seed(0)
    model = Conv4(3, image_size=16, hidden=4, pool="max")
    y = torch.arange(3).repeat(2, 1)
    x, z = torch.randn(2, 2, 3, 1, 16, 16).unbind()
    batch = TaskBatch(x, y, z, y, torch.zeros(2, dtype=torch.int64))

    def operators(quantities: Quantities) -> list[str]:
        graph = copy.deepcopy(program_of(model, batch, 2, quantities)[0].module.graph)
        (output,) = (n for n in graph.nodes if n.op == "output")
        output.args = (tuple(output.args[0][-2:]),)  # the loss and the score
        graph.eliminate_dead_code()
        return [str(n.target) for n in graph.nodes if n.op == "call_function"]

    assert operators(GRADIENTS) == operators(SCORES)


def test_strides_of_inputs_do_not_matter() -> None:
    """Tensors with one channel, or one image, are contiguous with many strides."""
    torch.manual_seed(0)
    model = Conv4(3, image_size=16, hidden=4).double()
    y = torch.arange(3).repeat(2, 1)
    x, z = torch.randn(2, 2, 3, 1, 16, 16, dtype=torch.float64).unbind()
    group = torch.zeros(2, dtype=torch.int64)
    program, (expected,) = program_of(model, TaskBatch(x, y, z, y, group), 2, GRADIENTS)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 4:
                p.data = p.data.clone(memory_format=torch.channels_last)
    x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    again, (strange,) = program_of(model, TaskBatch(x, y, z, y, group), 2, GRADIENTS)
    assert again is program
    with torch.inference_mode():
        assert equal(program(*strange), program(*expected))
        assert equal(program.module(*strange), program(*expected))
