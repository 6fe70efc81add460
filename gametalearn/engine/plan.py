"""How a batch is computed: chosen from the model, shapes, device and threads, never by timing.

`planned` is a pure function of numbers, so a GPU's plan can be made and tested without a GPU;
`choose` reads the numbers off a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from gametalearn.adaptation import Learner, Params
from gametalearn.engine.task import Data
from gametalearn.errors import InputError, require_whole

__all__ = [
    "Machine",
    "Method",
    "Plan",
    "Work",
    "choose",
    "free_memory",
    "planned",
    "reckoned",
    "work_of",
]

Method = Literal["auto", "loop", "replay", "verify"]

TRACEABLE = ("cpu", "cuda")
"""Device types on which tasks are replayed."""
CHUNK_TASKS = 64
SCORED_TASKS = 16
"""Tasks that evaluation computes at once, however many there are."""

# On a CPU: elements of input that a chunk may hold. Activations are a hundred times larger; beyond
# this a chunk leaves the cache, and nothing is gained by folding more tasks into one kernel call.
CHUNK_INPUT = 2**19
CHUNK_PARAMETERS = 2**24
# Elements of input below which a second worker costs more than it brings.
WORKER_INPUT = 2**14

# On a GPU: the share of the free memory that a chunk may take; how many copies of a forward pass's
# activations a replay holds; and how many of the parameters, at the least and for each inner step.
SHARE = 0.5
ACTIVATIONS = 3
PARAMETERS, PARAMETERS_A_STEP = 5, 2


@dataclass(frozen=True)
class Plan:
    """How T tasks are computed.

    Attributes:
        method: ``"loop"`` or ``"replay"``.
        chunk: tasks that one replay computes; the last chunk is padded with copies.
        workers: threads that share the chunks; with one, kernels use all threads themselves.
        verify: compare every call with the loop.
    """

    method: Literal["loop", "replay"]
    chunk: int = 1
    workers: int = 1
    verify: bool = False


@dataclass(frozen=True)
class Machine:
    """What a batch is computed on.

    Attributes:
        kind: the device type: ``"cpu"``, ``"cuda"`` or another.
        threads: CPU threads.
        free: free bytes of the device's memory; None if unknown or not a limit.
        autocast: whether autocast is on.
    """

    kind: str
    threads: int = 1
    free: int | None = None
    autocast: bool = False


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
        tasks: T.
        inputs: elements of a task's support and query inputs.
        parameters: P, learned rates included.
        held: the most bytes that the replay of one task holds at once.
    """

    tasks: int
    inputs: int
    parameters: int
    held: int


def planned(
    work: Work,
    machine: Machine,
    *,
    method: Method = "auto",
    chunk: int | None = None,
    scores: bool = False,
) -> Plan:
    """The plan for a batch, from numbers alone.

    On a CPU a chunk fits the cache, and worker threads share the chunks. On a GPU a chunk takes as
    many tasks as half of its free memory holds, up to the whole meta-batch.

    Args:
        work, machine: what is computed, and on what.
        method: force a method.
        chunk: force a chunk size.
        scores: compute only losses and scores, for batches of varying T (evaluation): the chunk
            does not depend on T.

    >>> mini_imagenet = Work(tasks=4, inputs=1_693_440, parameters=32_773, held=1_200_000_000)
    >>> planned(mini_imagenet, Machine("cpu", threads=2))
    Plan(method='replay', chunk=1, workers=2, verify=False)
    >>> planned(mini_imagenet, Machine("cuda", free=80 * 2**30))
    Plan(method='replay', chunk=4, workers=1, verify=False)
    """
    if method == "auto":
        traceable = machine.kind in TRACEABLE and not machine.autocast
        method = "replay" if traceable else "loop"
    if method == "loop":
        return Plan("loop")
    most, workers = _most(work, machine), _workers(work, machine)
    if chunk is None and scores:
        chunk = min(most, max(1, SCORED_TASKS // workers))  # each worker has its share
    elif chunk is None:
        share = -(-work.tasks // workers)  # as many rounds as needed, all chunks alike
        chunk = -(-share // -(-share // most))
    workers = min(workers, -(-work.tasks // chunk))
    return Plan("replay", chunk, workers, verify=method == "verify")


def _most(work: Work, machine: Machine) -> int:
    """The most tasks in a chunk, a power of two."""
    inputs, parameters = max(1, work.inputs), max(1, work.parameters)
    most = min(CHUNK_INPUT / inputs, CHUNK_PARAMETERS / parameters)
    if machine.kind == "cuda" and machine.free is not None:
        most = SHARE * machine.free / max(1, work.held)
    return min(1 << max(0, int(most).bit_length() - 1), CHUNK_TASKS)


def _workers(work: Work, machine: Machine) -> int:
    """Threads that share the chunks; a GPU has one, as its kernels are queued anyway."""
    enough = work.inputs * work.tasks >= WORKER_INPUT * machine.threads
    return machine.threads if machine.kind == "cpu" and enough else 1


@functools.lru_cache(256)
def work_of(
    parameters: tuple[torch.Size, ...],
    support: torch.Size,
    query: torch.Size,
    *,
    tasks: int,
    steps: int,
    second_order: bool,
    queries_held: int = 1,
    item: int = 4,
    tokens: bool = False,
) -> Work:
    """What is computed, from shapes alone.

    A replay's memory is estimated from above: as if every layer kept the images' full
    height and width. A forward pass on n examples then yields n * places * (the sum of the layers'
    outputs) numbers; the support set's are held for every second-order inner step, and
    the queries' once. A replay holds them up to three times, derivatives included. A test compares
    this with what programs hold. Products of positions with positions (attention) are not
    included, and the device's libraries need their own memory: hence only `SHARE` of what is free.

    Args:
        parameters: the shapes of the meta-parameters.
        support, query: the shapes ``(S, *x)`` and ``(Q, *x)`` of a task's inputs.
        tasks: T.
        steps: inner steps.
        second_order: whether their graphs are kept.
        queries_held: how often the queries are predicted before the row is differentiated.
        item: bytes per number.
        tokens: whether inputs are integers: positions of a sequence, each embedded separately.
    """
    numbers = sum(map(math.prod, parameters))
    width = sum(shape[0] for shape in parameters if len(shape) > 1)
    places = _places(support[1:], tokens or any(len(shape) > 2 for shape in parameters))
    kept = max(1, steps) if second_order else 1
    passes = support[0] * (kept + 1) + query[0] * queries_held
    inputs = math.prod(support) + math.prod(query)
    held = ACTIVATIONS * width * places * passes + 2 * inputs
    held += (PARAMETERS + PARAMETERS_A_STEP * kept) * numbers
    return Work(tasks, inputs, numbers, item * held)


def _places(example: Sequence[int], spread: bool) -> int:
    """How many vectors a layer outputs per example: at most the pixels of an image.

    Args:
        example: its shape. The smallest dimension is taken for the channels, which may come first or last.
        spread: whether a single dimension counts as places too, as for convolutions over a signal.
    """
    if len(example) < 2:
        return math.prod(example) if spread else 1
    return math.prod(example) // max(1, min(example))


@functools.cache
def free_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory that were free at the first call; None if it does not report them.

    It is queried once per process, so that a run's chunks stay the same while other processes come
    and go on the GPU.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + own


def choose(
    meta: Params,
    data: Data,
    learner: Learner,
    *,
    method: Method = "auto",
    chunk: int | None = None,
    threads: int | None = None,
    scores: bool = False,
) -> Plan:
    """The plan for a batch.

    Args:
        meta: the meta-parameters.
        data: the batch's tensors, with at least one task.
        learner: the inner loop.
        method, chunk, scores: as in `planned`.
        threads: threads to use; by default `torch.get_num_threads`.

    Raises:
        InputError: an argument is out of range.
    """
    if method not in get_args(Method):
        raise InputError(f"method must be one of {', '.join(get_args(Method))}; got '{method}'")
    for name, value in (("chunk", chunk), ("threads", threads)):
        if value is not None:
            require_whole(name, value, 1)
    device = data[0].device
    machine = Machine(
        device.type,
        torch.get_num_threads() if threads is None else threads,
        free_memory(device),
        device.type in TRACEABLE and torch.is_autocast_enabled(device.type),
    )
    work = reckoned(meta, data, learner, scores)
    return planned(work, machine, method=method, chunk=chunk, scores=scores)


def reckoned(meta: Params, data: Data, learner: Learner, scores: bool = False) -> Work:
    """What is computed for a batch; the arguments are those of `choose`."""
    support_x, _, query_x, _ = data
    weighted = 0 if scores else len(getattr(learner, "step_weights", ()))
    return work_of(
        tuple(p.shape for p in meta.values()),
        support_x.shape[1:],
        query_x.shape[1:],
        tasks=len(support_x),
        steps=learner.steps,
        second_order=not (scores or learner.first_order),
        queries_held=max(1, weighted),
        item=max((p.element_size() for p in meta.values()), default=4),
        tokens=not support_x.is_floating_point(),
    )
