"""Read off a run's log which weights other rules would have given its clean and spoiled tasks.

A run with spoiled tasks (`gametalearn train --disagree SHARE`) logs the length of every task's
gradient and their cosines. From these follow, without another training, the weights of gradient
agreement, of agreement of unit-length gradients, and of both without a task's product with itself.
Printed for each, over the logged iterations asked for: the chance that a clean task has more weight
than a spoiled one of its meta-batch (AUC; 0.5 is chance), mean weights times T, and the share of
negative ones; then lengths, cosines and query losses themselves.

example:
  gametalearn train --config experiments/configs/disagreement.toml --rule uniform --disagree 0.4 \\
      --log-every 3 --threads 1 --out runs/look
  python experiments/read_weights.py runs/look --first 401
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from gametalearn import InputError, agreement_weights_from_gramian

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def paper(gramian: Array) -> Array:
    weights: Array = agreement_weights_from_gramian(torch.from_numpy(gramian)).numpy()
    return weights


def others_only(gramian: Array) -> Array:
    """s_i = sum over j != i of <g_i, g_j>, divided by sum |s|."""
    s: Array = gramian.sum(1) - np.diag(gramian)
    weights: Array = s / np.abs(s).sum()
    return weights


RULES: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "agreement": (paper, False),
    "agreement-cosine": (paper, True),
    "agreement, without the product with itself": (others_only, False),
    "agreement-cosine, without the product with itself": (others_only, True),
}
"""The weights that a Gramian gives, and whether the gradients have unit length."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="what train wrote")
    parser.add_argument("--first", type=int, default=1, help="first iteration (default 1)")
    parser.add_argument("--last", type=int, default=10**9, help="last iteration (default: the end)")
    return parser.parse_args(argv)


def read(run: Path, first: int, last: int) -> list[tuple[Array, Array, Array, Mask]]:
    """Logged losses and lengths ``(T,)``, cosines ``(T, T)`` and which tasks are spoiled ``(T,)``."""
    file = run / "metrics.jsonl"
    if not file.exists():
        raise InputError(f"{run}: no run there (metrics.jsonl is missing)")
    found = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        if first <= record["iteration"] <= last and any(record.get("spoiled", ())):
            if "cosine" not in record["diagnostics"]:
                raise InputError(f"{run}: it logged no cosines; train with --log-matrices")
            norms, cosine = (np.array(record["diagnostics"][k]) for k in ("norms", "cosine"))
            losses = np.array(record["losses"])
            found.append((losses, norms, cosine, np.array(record["spoiled"], dtype=bool)))
    if not found:
        raise InputError(
            f"{run}: no logged iteration from {first} to {last} has spoiled tasks; "
            "train with --disagree, --log-matrices and a smaller --log-every"
        )
    return found


def ahead(own: Array, other: Array) -> Array:
    """For each pair of the two, 1 where the first is larger, 0 where it is smaller, and 1/2 for a tie."""
    pairs: Array = (np.sign(own[:, None] - other) / 2 + 0.5).ravel()
    return pairs


def mean_cosine(norms: Array, cosine: Array, spoiled: Mask) -> float:
    """Between the mean gradient of the clean tasks and that of the spoiled ones."""
    groups = np.stack([~spoiled, spoiled]) * norms
    (clean, mixed), (_, bad) = groups @ cosine @ groups.T
    return float(mixed / np.sqrt(clean * bad))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        batches = read(args.run, args.first, args.last)
    except InputError as error:
        print(f"read_weights: {error}", file=sys.stderr)
        return 2
    print("| rule | AUC | weight, clean / spoiled | negative, clean / spoiled |\n|---|---|---|---|")
    for name, (rule, unit) in RULES.items():
        won, clean, bad = [], [], []
        for _, norms, cosine, spoiled in batches:
            weights = rule(cosine if unit else np.outer(norms, norms) * cosine)
            own, other = weights[~spoiled], weights[spoiled]
            won.append(ahead(own, other))
            clean.append(own * len(weights))
            bad.append(other * len(weights))
        c, b = np.concatenate(clean), np.concatenate(bad)
        print(
            f"| {name} | {np.concatenate(won).mean():.2f} | {c.mean():.2f} / {b.mean():.2f} "
            f"| {100 * (c < 0).mean():.0f}% / {100 * (b < 0).mean():.0f}% |"
        )
    pairs: dict[str, list[Array]] = {"clean": [], "mixed": [], "spoiled": []}
    lengths: dict[str, list[Array]] = {"clean": [], "spoiled": []}
    itself, lost, opposed = [], [], []
    for losses, norms, cosine, spoiled in batches:
        different = ~np.eye(len(norms), dtype=bool)
        pairs["clean"].append(cosine[np.outer(~spoiled, ~spoiled) & different])
        pairs["mixed"].append(cosine[np.outer(~spoiled, spoiled)])
        pairs["spoiled"].append(cosine[np.outer(spoiled, spoiled) & different])
        lengths["clean"].append(norms[~spoiled])
        lengths["spoiled"].append(norms[spoiled])
        lost.append(ahead(losses[spoiled], losses[~spoiled]))
        if not spoiled.all():
            opposed.append(mean_cosine(norms, cosine, spoiled))
        itself.append((norms**2).sum() / (np.outer(norms, norms) * cosine).sum())

    def mean(parts: list[Array], form: str = "+.3f") -> str:
        values = np.concatenate(parts)
        return f"{values.mean():{form}}" if len(values) else "-"

    print(
        f"\n{len(batches)} meta-batches. Length of a gradient: clean {mean(lengths['clean'], '.2f')}, "
        f"spoiled {mean(lengths['spoiled'], '.2f')}.\nMean cosine: of two clean tasks "
        f"{mean(pairs['clean'])}, of a clean and a spoiled one {mean(pairs['mixed'])}, of "
        f"two spoiled ones {mean(pairs['spoiled'])}.\nProducts of tasks with themselves / sum "
        f"over i of s_i: median {np.median(itself):.2f}.\nCosine of the mean clean and the mean spoiled "
        f"gradient: {np.mean(opposed) if opposed else np.nan:+.3f}. A spoiled task has a higher query loss "
        f"than a clean one in {100 * np.concatenate(lost).mean():.1f}% of pairs."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
