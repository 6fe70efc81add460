"""TorchJD: our agreement as one of its weightings, and its aggregators as rules here.

Needs the extra ``torchjd``: ``pip install '.[torchjd]'`` in a clone, or ``pip install
'torchjd[quadprog-projector]>=0.18'``. TorchJD (Quinton and Rey 2024, arXiv 2406.16232) calls
a row of ``(T, P)`` an objective, the matrix a Jacobian and its ``(T, T)`` products the Gramian.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from gametalearn.errors import InputError
from gametalearn.gradients import TaskGradients
from gametalearn.randomness import generator
from gametalearn.registry import TORCHJD_PACKAGE
from gametalearn.weighting.agreement import agreement_weights_from_gramian
from gametalearn.weighting.options import check_options
from gametalearn.weighting.weights import Weights, check_finite, largest_entries
from gametalearn.words import did_you_mean

try:
    import torchjd.aggregation
    from torchjd import Stateful
    from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator, Weighting
    from torchjd.linalg import PSDMatrix
except ImportError as error:
    raise InputError(
        f"TorchJD 0.18 or later is not installed ({error}); pip install '{TORCHJD_PACKAGE}'"
    ) from error

__all__ = ["AgreementWeighting", "TorchJDRule", "torchjd_rules"]


class AgreementWeighting(Weighting[PSDMatrix]):
    """Gradient agreement as a TorchJD weighting of a Gramian.

    ``GramianWeightedAggregator(AgreementWeighting())`` is an aggregator for ``torchjd.autojac``; the
    weighting itself serves ``torchjd.autogram`` and `CRMOGMWeighting`. It is not differentiable.

    Args:
        normalize: as in `agreement_weights`.

    The weights are those of `agreement_weights_from_gramian`; a Gramian that is not finite raises an
    `InputError`, which names the task if it can be told. TorchJD forms it in the gradients' own
    dtype, whose range squares leave early. Gradients beyond 1e19 in float32 (256 in float16) are an
    error, as are those all so short, below 1e-21 (1e-3), that their squares lose their digits; with
    ``normalize`` one is enough. Where all squares are zero, so that the weights are uniform, a
    warning says that the gradients may be shorter still.

    >>> weighting = AgreementWeighting()
    >>> weighting(torch.tensor([[1.0, 1.0, -1.0], [1.0, 2.0, -1.0], [-1.0, -1.0, 1.0]]))
    tensor([ 0.2500,  0.5000, -0.2500])
    >>> aggregator = GramianWeightedAggregator(weighting)
    >>> aggregator(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
    tensor([1.0000, 0.5000])
    """

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights ``(T,)`` of a Gramian ``(T, T)``."""
        square = gramian.diagonal()
        if bool(torch.isinf(square).any()) and not bool(torch.isnan(square).any()):
            self._overflown(square)
        if len(gramian) > 1 and not bool(torch.isfinite(square).any()):
            raise InputError(
                "no row of the Gramian is finite, so that the task at fault cannot be named: "
                "TorchJD differentiates all losses together, and 0 times NaN is NaN; check before "
                "backward() which of the losses is not finite"
            )
        self._check_underflow(square)
        return agreement_weights_from_gramian(gramian, normalize=self.normalize)

    @staticmethod
    def _overflown(square: Tensor) -> NoReturn:
        bad = torch.isinf(square).nonzero().flatten().tolist()
        others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"Gramian row of task {bad[0]}{others} is not finite: the gradient is, or its square "
            f"exceeds {square.dtype} ({torch.finfo(square.dtype).max:.3g}); scale the losses down, or "
            "use float64 (float32 for half precision)"
        )

    def _check_underflow(self, square: Tensor) -> None:
        """Are the squares ``(T,)`` so small that their dtype rounds them to too few digits?"""
        limits = torch.finfo(square.dtype)
        # half the digits of float32 must be left, as in `agreement_weights_from_gramian`
        least = limits.smallest_normal * limits.eps
        least /= math.sqrt(max(limits.eps, torch.finfo(torch.float32).eps))
        short = (square > 0) & (square < least)
        top = square.max()
        if bool(short.any()) and (self.normalize or bool(top < least)):
            task = int(short.to(torch.int8).argmax())
            raise InputError(
                f"Gramian row of task {task}: its squared gradient, {float(square[task]):.3g}, is too "
                f"small for {square.dtype}; scale the losses up, or use float64 (float32 for half "
                "precision)"
            )
        if len(square) > 1 and bool(top == 0):
            warnings.warn(
                "AgreementWeighting: all squared gradients are zero, and so the weights are uniform; "
                f"if the gradients are not, their squares are too small for {square.dtype}: scale the "
                "losses up, or use float64 (float32 for half precision)",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """The option."""
        return f"normalize={self.normalize}"


OPTIONS: dict[str, dict[str, Any]] = {"CAGrad": {"c": 0.5}, "FairGrad": {"alpha": 1.0}}
"""Values for options that TorchJD asks for without a default."""


def torchjd_rules() -> tuple[str, ...]:
    """The names that `TorchJDRule` knows: TorchJD's aggregators that weight rows.

    >>> {"UPGrad", "MGDA", "CAGrad", "IMTLG", "AlignedMTL"} <= set(torchjd_rules())
    True
    """
    return tuple(sorted(_aggregators()))


def _aggregators() -> dict[str, type[WeightedAggregator]]:
    found = {name: getattr(torchjd.aggregation, name) for name in torchjd.aggregation.__all__}
    bases = (WeightedAggregator, GramianWeightedAggregator)
    return {
        name: cls
        for name, cls in found.items()
        if inspect.isclass(cls) and issubclass(cls, WeightedAggregator) and cls not in bases
    }


class TorchJDRule(nn.Module):
    """A TorchJD aggregator as a weighting rule over the tasks of a meta-batch.

    The weights are exactly those with which TorchJD's aggregator would combine the same rows, in
    the same dtype (half precision is raised to float32). What follows from that:

    - Scale. UPGrad, DualProj, AlignedMTL, CAGrad, MGDA, IMTLG, Krum, Random, ExcessMTL and Mean are
      scaled like the mean over tasks; Sum, PCGrad and GradVac like the sum, T times longer; PCD like
      the first row; FairGrad and NashMTL by rules of their own. With SGD, choose the rate for it.
    - UPGrad, DualProj and CAGrad take gradients whose squared lengths sum to less than 1e-4 for
      zero: then the first two give the mean, CAGrad no update at all. Their options lower that.
    - GradVac, PCD, ExcessMTL and NashMTL keep state by row, and PCD's first row is the primary
      one. That suits rows that mean the same at every step, which the tasks of a meta-batch do not.

    Random, PCGrad and GradVac draw random numbers. They come from a generator of the rule's own;
    torch's global state is left as it was. ``state_dict()`` holds the generator and what a stateful
    aggregator keeps (its options included), so that training continues as if never interrupted.

    Args:
        name: one of `torchjd_rules`, in any case, with or without hyphens and the suffix
            ``Weighting``: ``"UPGrad"``, ``"imtl-g"``, ``"MGDAWeighting"``. Or an aggregator of your
            own: ``GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting()))``.
        seed: any int64; the start of the random numbers.
        options: of the aggregator; lists of numbers become tensors. Where TorchJD asks for one,
            CAGrad's ``c`` is 0.5 here, FairGrad's ``alpha`` 1, and NashMTL's ``n_tasks`` the first
            meta-batch's.

    Raises:
        InputError: an unknown name or option, or a solver that is not installed (TorchJD's UPGrad
            and DualProj need ``torchjd[quadprog_projector]``, CAGrad ``torchjd[cagrad]``, NashMTL
            ``torchjd[nash_mtl]``).

    >>> rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> losses = torch.zeros(2)
    >>> gradients = TaskGradients(rows, torch.zeros(2, 3), losses, losses, torch.tensor([0, 0]))
    >>> TorchJDRule("mgda")(gradients).effective
    tensor([0.6000, 0.4000])
    """

    _aggregator: WeightedAggregator

    def __init__(self, name: str | WeightedAggregator, *, seed: int = 0, **options: Any) -> None:
        super().__init__()
        if isinstance(name, str):
            aggregator = _build(name, options)
        elif options or not isinstance(name, WeightedAggregator):
            raise InputError(
                "TorchJDRule: expected a name with its options, or an aggregator of TorchJD that "
                f"weights rows and no options, got a {type(name).__name__} and {options}"
            )
        else:
            aggregator = name
        # Not a submodule: TorchJD's own state_dict() lacks part of its state (see get_extra_state).
        self.__dict__["_aggregator"] = aggregator
        self.name = type(aggregator).__name__
        self._count_tasks = isinstance(name, str) and self.name == "NashMTL"
        self._count_tasks &= "n_tasks" not in options
        self._generator = generator(seed)

    def forward(self, gradients: TaskGradients) -> Weights:
        """The weights of one meta-batch; raw and effective are the same. State advances in training.

        Raises:
            InputError: a row is not finite; or TorchJD refuses the rows, or fails on them.
        """
        rows = gradients.rows.detach()
        check_finite(largest_entries(rows), "gradient")
        before = None if self.training else self.get_extra_state()
        try:
            weights = self._weigh(rows)
        except (ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise InputError(f"rule 'torchjd:{self.name}': {error}{_too_long(rows)}") from error
        finally:
            if before is not None:
                self.set_extra_state(before)
        if not bool(torch.isfinite(weights).all()):
            raise InputError(
                f"rule 'torchjd:{self.name}': TorchJD gave weights that are not finite "
                f"({weights.tolist()[:4]}){_too_long(rows)}"
            )
        return Weights(raw=weights, effective=weights)

    def _weigh(self, rows: Tensor) -> Tensor:
        if self._count_tasks and self._aggregator.n_tasks != len(rows):
            self._aggregator.n_tasks = len(rows)  # type: ignore[assignment]
            self._aggregator.reset()  # type: ignore[operator]
        with torch.no_grad(), self._own_random(rows.device):
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            weights: Tensor = self._aggregator.weighting(wide)
        return weights.to(rows)

    @contextmanager
    def _own_random(self, device: torch.device) -> Iterator[None]:
        """Torch's global random state from our generator, and as it was again afterwards."""
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def get_extra_state(self) -> dict[str, Any]:
        """The random state, and every plain attribute of TorchJD's stateful modules.

        TorchJD keeps part of a weighting's state outside of its buffers, and starts afresh without.
        """
        return {
            "generator": self._generator.get_state(),
            "modules": {path: _plain_state(module) for path, module in self._stateful()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave."""
        self._generator.set_state(state["generator"].cpu())
        modules = dict(self._stateful())
        if modules.keys() != state["modules"].keys():
            raise InputError(
                f"rule 'torchjd:{self.name}': the state belongs to another rule, with modules "
                f"{sorted(state['modules'])} for {sorted(modules)}"
            )
        for path, module in modules.items():
            _restore(module, state["modules"][path])

    def _stateful(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self._aggregator.named_modules():
            if issubclass(type(module), Stateful):
                yield path, module

    def extra_repr(self) -> str:
        """TorchJD's description of the aggregator."""
        return repr(self._aggregator)


def _too_long(rows: Tensor) -> str:
    """What to do if the squares of these rows leave the range of the dtype that TorchJD gets."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    longest = float(torch.linalg.vector_norm(rows.double(), dim=1).max())
    if longest < math.sqrt(torch.finfo(wide).max):
        return ""
    return (
        f"; the square of the longest gradient ({longest:.3g}) exceeds {wide}: scale the losses "
        "down, or use float64"
    )


def _build(name: str, options: dict[str, Any]) -> WeightedAggregator:
    known = {_key(known): cls for known, cls in _aggregators().items()}
    cls = known.get(_key(name))
    if cls is None:
        raise InputError(
            f"TorchJDRule: TorchJD has no rule '{name}'; {did_you_mean(name, torchjd_rules())}known: "
            f"{', '.join(torchjd_rules())}"
        )
    label = f"rule 'torchjd:{cls.__name__}'"
    parameters = inspect.signature(cls).parameters
    given = {**OPTIONS.get(cls.__name__, {}), **options}
    if cls.__name__ == "NashMTL":
        given.setdefault("n_tasks", 1)
    try:
        given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{label}: lists must hold numbers, got {options}") from error
    check_options(f"torchjd:{cls.__name__}", cls, given)
    missing = [o for o, p in parameters.items() if p.default is p.empty and o not in given]
    if missing:
        raise InputError(
            f"{label} needs {', '.join(missing)}; give `rule_options` "
            f"{' '.join(f'torchjd:{name}.{option}=...' for option in missing)}, or pass "
            f"TorchJDRule('{name}', {', '.join(f'{option}=...' for option in missing)})"
        )
    try:
        return cls(**given)
    except (ImportError, ValueError) as error:
        raise InputError(f"{label}: {error}") from error


def _key(name: str) -> str:
    letters = "".join(c for c in name.lower() if c.isalnum())
    return letters.removesuffix("weighting")


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """Buffers and attributes that a checkpoint can hold; arrays as ``{"numpy": tensor}``."""
    inherited = vars(nn.Module())
    state: dict[str, Any] = {}
    for name, value in {**vars(module), **module._buffers}.items():
        if name in inherited:
            continue
        if isinstance(value, Tensor):
            state[name] = value.detach().clone()
        elif isinstance(value, np.ndarray):
            state[name] = {"numpy": torch.tensor(value)}
        elif _is_plain(value):
            state[name] = value
    return state


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, dict):
            value = value["numpy"].cpu().numpy().copy()
        elif isinstance(value, Tensor):
            value = value.clone()
        setattr(module, name, value)
    # NashMTL builds its convex program at its first step only.
    prepare = getattr(module, "_init_optim_problem", None)
    if state.get("step") and callable(prepare):
        prepare()
