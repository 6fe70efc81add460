"""How a batch is computed: chosen from the model, shapes, device and threads, never by timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from gametalearn.adaptation import Params
from gametalearn.engine.task import Data
from gametalearn.errors import InputError

__all__ = ["Method", "Plan", "choose"]

Method = Literal["auto", "loop", "replay", "verify"]

# Elements of input that a chunk may hold. Activations are a hundred times larger; beyond this a
# chunk leaves the cache, and nothing is gained by folding more tasks into one kernel call.
CHUNK_INPUT = 2**19
CHUNK_PARAMETERS = 2**24
CHUNK_TASKS = 64
# Elements of input below which a second worker costs more than it brings.
WORKER_INPUT = 2**14


@dataclass(frozen=True)
class Plan:
    """How T tasks are computed.

    Attributes:
        method: ``"loop"`` or ``"replay"``.
        chunk: tasks that one replay computes; the last chunk is filled up with copies.
        workers: threads that share out the chunks; with one, kernels use all threads themselves.
        verify: compare every call with the loop.
    """

    method: Literal["loop", "replay"]
    chunk: int = 1
    workers: int = 1
    verify: bool = False


def _power_below(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def choose(
    meta: Params,
    data: Data,
    *,
    method: Method = "auto",
    chunk: int | None = None,
    threads: int | None = None,
    fixed_chunk: bool = False,
) -> Plan:
    """The plan for a batch.

    Args:
        meta: the meta-parameters.
        data: the batch's tensors.
        method: force a method.
        chunk: force a chunk size.
        threads: threads to use; by default `torch.get_num_threads`.
        fixed_chunk: choose the chunk without regard to T, for batches of varying T (evaluation).
    """
    if method not in get_args(Method):
        raise InputError(f"method must be one of {', '.join(get_args(Method))}; got '{method}'")
    for name, value in (("chunk", chunk), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    support_x, _, query_x, _ = data
    tasks = len(support_x)
    device = support_x.device.type
    if method == "auto":
        traceable = device in ("cpu", "cuda") and not torch.is_autocast_enabled(device)
        method = "replay" if traceable else "loop"
    if method == "loop":
        return Plan("loop")
    threads = torch.get_num_threads() if threads is None else threads
    size = max(1, (support_x.numel() + query_x.numel()) // max(1, tasks))
    parameters = max(1, sum(p.numel() for p in meta.values()))
    most = min(_power_below(min(CHUNK_INPUT / size, CHUNK_PARAMETERS / parameters)), CHUNK_TASKS)
    workers = threads if device == "cpu" and size * tasks >= WORKER_INPUT * threads else 1
    if chunk is None and fixed_chunk:
        chunk = min(most, max(1, 16 // workers))  # 16 tasks come at once: each worker has its share
    elif chunk is None:
        share = -(-tasks // workers)  # as many rounds as needed, all chunks alike
        chunk = -(-share // -(-share // most))
    workers = min(workers, -(-tasks // chunk))
    return Plan("replay", chunk, workers, verify=method == "verify")
