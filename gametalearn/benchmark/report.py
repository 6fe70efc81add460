"""A result as a few lines, a sweep as lines and a plot."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from gametalearn.benchmark.figures import field_of
from gametalearn.benchmark.sides import SIDES

__all__ = ["plot_sweep", "summary", "sweep_line", "unpublishable"]


def summary(result: dict[str, Any]) -> str:
    """A result in a few lines."""
    rss = result["peak_rss_mb"]
    share = 1 - result["floor_ms"] / result["gametalearn_ms"]
    lines = [
        f"{result['config']} on {result['device']['name']}, threads: {result['threads']}, rounds: "
        f"{result['rounds']}; each side in a process of its own",
        f"  {'':22}  {'ms':>8}   quartiles, spread between rounds",
    ]
    remarks = {
        "learn2learn": times_slower(result, "speedup"),
        "learn2learn-as-shipped": times_slower(result, "speedup_as_shipped"),
        "floor": f"convolutions and products alone; {share:.0%} is overhead",
    }
    for side in SIDES:
        low, _, high = result[f"{field_of(side)}_quartiles"]
        spread = f"{low:.1f} to {high:.1f}, {result['round_spread'][side]:.0%}"
        line = f"  {side:22}  {result[field_of(side)]:8.1f}   {spread:24}  {remarks.get(side, '')}"
        lines.append(line.rstrip())
    if "float32_rel_error" in result:
        errors = result["float32_rel_error"]
        lines.append(
            f"  error   float64 {result['float64_rel_error']:.1e} (learn2learn "
            f"{result['float64_rel_error_learn2learn']:.1e}); float32 {errors['gametalearn']:.1e} "
            f"(learn2learn {errors['learn2learn']:.1e})"
        )
    lines.append(f"  memory  {rss['gametalearn']:.0f} MB (learn2learn {rss['learn2learn']:.0f} MB)")
    if (taken := result["peak_device_mb"]) is not None:
        lines.append(
            f"  of the device  {taken['gametalearn']:.0f} MB (learn2learn {taken['learn2learn']:.0f} MB)"
        )
    lines.append(f"  setup   {result['setup_s']:.1f} s, once")
    return "\n".join([*lines, *unpublishable(result)])


def times_slower(result: dict[str, Any], name: str) -> str:
    """A ratio with the digits that its resolution allows, and the ratios of the rounds."""
    off = result[f"{name}_resolution"]
    digits = 2 if off is None or off < 0.1 else 1
    ratios = ", ".join(f"{r:.{digits}f}" for r in result[f"{name}_by_round"])
    known = "" if off is None else f" ± {off:.{digits}f}"
    return f"{result[name]:.{digits}f}{known} times slower (by round {ratios})"


def unpublishable(*results: dict[str, Any]) -> list[str]:
    """What is said of figures that are not to be published; nothing of others."""
    why = dict.fromkeys(w for r in results for w in r["not_publishable_because"])
    if not why:
        return []
    text = "These figures are not to be published: " + "; ".join(why) + "."
    return textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="  ")


def sweep_line(result: dict[str, Any]) -> str:
    """One result of a sweep."""
    memory = result["peak_rss_mb"]
    return (
        f"{result['axis']} {result['value']:3d}: gametalearn {result['gametalearn_ms']:7.1f} ms "
        f"{memory['gametalearn']:5.0f} MB, learn2learn {result['learn2learn_ms']:7.1f} ms "
        f"{memory['learn2learn']:5.0f} MB, {times_slower(result, 'speedup')}, "
        f"floor {result['floor_ms']:.1f} ms"
    )


def plot_sweep(results: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory against the axis: gametalearn, learn2learn, and the floor."""
    from matplotlib.figure import Figure

    axis, config = results[0]["axis"], results[0]["config"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_plot, memory_plot = figure.subplots(1, 2)
    x = [r["value"] for r in results]
    for label, key, style in (
        ("learn2learn", "learn2learn_ms", "s-"),
        ("gametalearn", "gametalearn_ms", "o-"),
        ("gametalearn, first order", "first_order_ms", "o:"),
        ("convolutions and products alone", "floor_ms", "k--"),
    ):
        time_plot.plot(x, [r[key] for r in results], style, label=label)
    for side, style in (("learn2learn", "s-"), ("gametalearn", "o-")):
        memory_plot.plot(x, [r["peak_rss_mb"][side] for r in results], style, label=side)
    time_plot.set(xlabel=axis, ylabel="ms a meta-gradient", ylim=(0, None))
    memory_plot.set(xlabel=axis, ylabel="peak memory of the process, MB", ylim=(0, None))
    for plot in (time_plot, memory_plot):
        plot.set_xticks(x)
        plot.grid(alpha=0.3)
        plot.legend(frameon=False, fontsize=8)
    threads = "" if axis == "threads" else f", {results[0]['threads']} threads"
    warning = "" if all(r["publishable"] for r in results) else "; not to be published"
    figure.suptitle(f"{config}{threads}{warning}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
