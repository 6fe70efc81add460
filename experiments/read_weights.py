"""Read off a run's log which weights other rules would have given its clean and corrupted tasks.

A run with corrupted tasks (`gametalearn train --disagree SHARE`) logs the length of every task's
gradient and their cosines. From these follow, without another training, the weights of gradient
agreement, of agreement of unit-length gradients, and of both without a task's product with itself.
Printed for each, over the logged iterations asked for: the chance that a clean task has more weight
than a corrupted one of its meta-batch (AUC; 0.5 is chance), mean weights times T, and the share of
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
from gametalearn.errors import require_whole
from gametalearn.files import make_folder, write_json
from gametalearn.runfolder import settings_in

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
Batch = tuple[Array, Array, Array, Mask]


END = 10**9
"""Beyond any training's last iteration."""


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
    parser.add_argument("--last", type=int, default=END, help="last iteration (default: the end)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser.parse_args(argv)


def read(run: Path, first: int, last: int) -> list[Batch]:
    """Logged losses and lengths ``(T,)``, cosines ``(T, T)`` and which tasks are spoiled ``(T,)``."""
    require_whole("--first", first, 1)
    require_whole("--last", last, first)
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
            f"{run}: no logged iteration from {first} {f'to {last}' if last < END else 'on'} has corrupted tasks; "
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


def weighed(batches: list[Batch]) -> dict[str, dict[str, float]]:
    """By rule the AUC, mean weights times T, and the shares of negative ones."""
    found = {}
    for name, (rule, unit) in RULES.items():
        won, clean, bad = [], [], []
        for _, norms, cosine, spoiled in batches:
            weights = rule(cosine if unit else np.outer(norms, norms) * cosine)
            own, other = weights[~spoiled], weights[spoiled]
            won.append(ahead(own, other))
            clean.append(own * len(weights))
            bad.append(other * len(weights))
        c, b = np.concatenate(clean), np.concatenate(bad)
        found[name] = {
            "auc": float(np.concatenate(won).mean()),
            "clean": float(c.mean()),
            "spoiled": float(b.mean()),
            "negative_clean": float((c < 0).mean()),
            "negative_spoiled": float((b < 0).mean()),
        }
    return found


def seen(batches: list[Batch]) -> dict[str, float | None]:
    """Mean lengths and cosines, and how losses tell spoiled tasks; None where there are no such pairs."""
    parts: dict[str, list[Array]] = {}
    itself, lost, opposed = [], [], []
    for losses, norms, cosine, spoiled in batches:
        different = ~np.eye(len(norms), dtype=bool)
        for name, values in (
            ("cosine_clean", cosine[np.outer(~spoiled, ~spoiled) & different]),
            ("cosine_between", cosine[np.outer(~spoiled, spoiled)]),
            ("cosine_spoiled", cosine[np.outer(spoiled, spoiled) & different]),
            ("length_clean", norms[~spoiled]),
            ("length_spoiled", norms[spoiled]),
        ):
            parts.setdefault(name, []).append(values)
        lost.append(ahead(losses[spoiled], losses[~spoiled]))
        if not spoiled.all():
            opposed.append(mean_cosine(norms, cosine, spoiled))
        itself.append((norms**2).sum() / (np.outer(norms, norms) * cosine).sum())
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    joined |= {"higher_loss": np.concatenate(lost), "cosine_means": np.array(opposed)}
    found = {name: float(v.mean()) if len(v) else None for name, v in joined.items()}
    return {**found, "itself": float(np.median(itself))}


def report(batches: list[Batch]) -> str:
    """What is printed."""
    lines = [
        "| rule | AUC | weight, clean / corrupted | negative, clean / corrupted |",
        "|---|---|---|---|",
    ]
    for name, one in weighed(batches).items():
        lines.append(
            f"| {name} | {one['auc']:.2f} | {one['clean']:.2f} / {one['spoiled']:.2f} "
            f"| {100 * one['negative_clean']:.0f}% / {100 * one['negative_spoiled']:.0f}% |"
        )
    shown = seen(batches)

    def text(name: str, form: str = "+.3f", scale: float = 1) -> str:
        value = shown[name]
        return "-" if value is None else f"{scale * value:{form}}"

    return "\n".join([
        *lines, "",
        f"{len(batches)} meta-batches. Length of a gradient: clean {text('length_clean', '.2f')}, "
        f"corrupted {text('length_spoiled', '.2f')}.",
        f"Mean cosine: of two clean tasks {text('cosine_clean')}, of a clean and a corrupted one "
        f"{text('cosine_between')}, of two corrupted ones {text('cosine_spoiled')}.",
        f"Products of tasks with themselves / sum over i of s_i: median {text('itself', '.2f')}.",
        f"Cosine of the mean clean and the mean corrupted gradient: {text('cosine_means')}. A corrupted task has "
        f"a higher query loss than a clean one in {text('higher_loss', '.1f', 100)}% of pairs.",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        batches = read(args.run, args.first, args.last)
        if args.json is not None:
            make_folder(args.json.parent)
            config = settings_in(args.run)
            write_json(args.json, {
                "tasks": config["disagree_kind"], "share": config["disagree"], "seed": config["seed"],
                "iterations": [args.first, min(args.last, config["iterations"])],
                "meta_batches": len(batches), "seen": seen(batches), "rules": weighed(batches),
            }, indent=2)  # fmt: skip
    except InputError as error:
        print(f"read_weights: {error}", file=sys.stderr)
        return 2
    print(report(batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
