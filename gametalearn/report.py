"""What a person looks at of a comparison: its plots and its ``report.html``."""

from __future__ import annotations

import importlib.resources
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gametalearn.canvas import drawing, saved
from gametalearn.cautions import cautions
from gametalearn.config import TrainConfig
from gametalearn.errors import InputError
from gametalearn.figures import accuracy, differences, learning_curves, vary, weights
from gametalearn.files import replacing
from gametalearn.jobs import Planned, Terms, commands_of, flags_of, place_of
from gametalearn.logs import Record, Records, records_of
from gametalearn.objective_figures import FACTS, objective_weights, rule_facts, trade_off
from gametalearn.objective_tables import ALONE, objective_tables
from gametalearn.registry import is_handed_in
from gametalearn.results import Comparison
from gametalearn.singles import single_runs
from gametalearn.stored import earlier_looks, other_looks, read_results
from gametalearn.tables import notes, rows, sentence, title
from gametalearn.units import Units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["html_of", "plot_comparison", "plot_results", "write_report"]


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """`plot_results` of a comparison whose runs lie below ``folder``."""
    results = comparison.as_dict()
    return plot_results(results, records_of(folder, results), folder)


def plot_results(results: dict[str, Any], records: Records, folder: Path) -> list[Path]:
    """Draw a comparison; the files written.

    ``learning_curves.png`` (validation, the mean over seeds and their range), ``accuracy.png`` (or
    ``mse.png``, by the score's name: test, intervals over seeds, and every seed), ``differences.png``
    from the baseline, and for each rule whose weights vary over tasks ``weights-RULE.png``. Of several
    objectives also ``objective_weights.png``, ``trade_off.png``, and what a rule goes by
    (``r-gradnorm.png``, ``kappa-dtp.png``).

    Args:
        results: the content of ``results.json``.
        records: what the runs logged, by `gametalearn.logs.records_of`.
        folder: where they are to lie.
    """
    with drawing():
        drawn = {
            "learning_curves": learning_curves(results, records),
            _file_name(results["metric"]["name"]): accuracy(results),
        }
        if results["paired"]:
            drawn["differences"] = differences(results)
        for rule, runs in records.items():
            if vary(runs):
                drawn[f"weights-{rule.replace(':', '-')}"] = weights(results, rule, runs)
        drawn |= {name: found for name, found, *_ in _of_objectives(results, records)}
        return [saved(one, folder / f"{name}.png", 140) for name, one in drawn.items()]


TAKEN = ("learning_curves", "differences", "trade_off", "objective_weights")
"""What other plots are called."""


def _file_name(name: str) -> str:
    """A score's name without what a file system may object to, and other than other plots'."""
    plain = re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "score"
    return f"test-{plain}" if plain in TAKEN else plain


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from a comparison's folder; the file.

    One file that opens anywhere, without a network: what was found and how sure that is, the plots,
    every seed's numbers, all settings, and the commands that repeat it. Without the runs' metrics it
    lacks the plots that are made of them.

    Raises:
        InputError: no ``results.json`` there, or one that is damaged or of another version.
    """
    results = read_results(folder)
    records, missing = None, ""
    try:
        records = records_of(folder, results)
    except InputError as error:
        missing = f"Without the runs' metrics there are no curves: {error}."
    looks, others = earlier_looks(folder, results), other_looks(folder, results)
    text = html_of(results, records, looks, folder, missing, others)
    with replacing(folder / "report.html") as stream:
        stream.write(text.encode())
    return folder / "report.html"


def html_of(
    results: dict[str, Any],
    records: Records | None,
    looks: Sequence[int],
    folder: Path,
    missing: str = "",
    others: Sequence[str] = (),
) -> str:
    """The content of ``report.html``.

    Args:
        results: the content of ``results.json``.
        records: the runs' metrics, if they are there; ``missing`` says why not.
        looks, others: as in `gametalearn.cautions.cautions`.
        folder: how the comparison's folder is called in commands.
        missing: what is said in place of the pictures that metrics are needed for.
    """
    import jinja2

    template = importlib.resources.files("gametalearn").joinpath("report.html.jinja").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    units, pairs, seeds = Units.of(results), results["paired"], _seeds(results)
    columns = ["rule", *(f"seed {one['seed']}" for one in seeds)]

    alone = {f"{ALONE} {name}": one for name, one in results.get("single", {}).items()}

    def by_seed(show: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        entries = {**results["rules"], **alone}
        return _sheet(columns, [[rule, *map(show, e["seeds"])] for rule, e in entries.items()])

    baseline = pairs[0]["baseline"] if pairs else ""
    compared = [rule for rule in results["rules"] if rule != baseline]
    return environment.from_string(template).render(
        title=title(results),
        heading=", ".join(compared) + (f" beside {baseline}" if pairs else ""),
        findings=[sentence(results, pair) for pair in pairs] or ["One rule, and none beside it."],
        metric=units.heading,
        baseline=baseline,
        unit=", in points" if units.percent else "",
        rules=_sheet(*rows(results)),
        objectives=[
            {"caption": caption, **_sheet(header, lines)}
            for caption, header, lines in objective_tables(results)
        ],
        notes=notes(results),
        cautions=cautions(results, records, looks, others),
        pictures=_pictures(results, records),
        no_records=missing,
        seeds=by_seed(lambda one: units.show(one[units.name])),
        pairs=_sheet(
            columns, [[p["rule"], *(units.show(d, "+") for d in p["by_seed"])] for p in pairs]
        ),
        times=by_seed(lambda one: f"{one['seconds']:.0f} s, {one.get('best_iteration') or '-'}"),
        settings=_settings(results["config"]),
        environment=_sheet([], _environment(results["environment"]))["rows"],
        commands=_commands(results, folder),
    )


def _sheet(header: Sequence[str], lines: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"header": header, "rows": [{"cells": line, "changed": False} for line in lines]}


def _seeds(results: dict[str, Any]) -> list[dict[str, Any]]:
    return next(iter(results["rules"].values()))["seeds"]  # type: ignore[no-any-return]


def _pictures(results: dict[str, Any], records: Records | None) -> list[dict[str, Any]]:
    """The plots, narrow enough for a phone, each with a caption, and in words what it shows."""
    units, width = Units.of(results), 5.0
    with drawing():
        told = "; ".join(
            f"{rule} {units.show(entry[units.name])}"
            + ("" if entry["ci95"] is None else f" plus or minus {units.show(entry['ci95'])}")
            for rule, entry in results["rules"].items()
        )
        caption = f"Test {units.heading} of each rule, on every seed."
        found = [("accuracy", accuracy(results, width), caption, f"{told}.")]
        if pairs := results["paired"]:
            caption = f"Each rule minus {pairs[0]['baseline']}, on the same test episodes."
            told = " ".join(sentence(results, pair) for pair in pairs)
            found.append(("differences", differences(results, width), caption, told))
        if records:
            told = "; ".join(
                f"{rule} {units.show(sum(values) / len(values))}"
                for rule, runs in records.items()
                if (values := [v[-1] for run in runs if (v := _validated(run))])
            )
            caption = "Validation over the iterations."
            told = f"At the end, in the mean over seeds: {told}."
            found.append(("curves", learning_curves(results, records, width), caption, told))
            for number, (rule, runs) in enumerate(records.items()):
                if vary(runs):
                    caption = f"The weights that {rule} gave the tasks of a meta-batch."
                    last = runs[0][-1].effective
                    told = f"At the end they are between {last.min():.3f} and {last.max():.3f}."
                    drawn = weights(results, rule, runs, width, most=80)
                    found.append((f"weights{number}", drawn, caption, told))
        found += _of_objectives(results, records or {}, width)
        return [
            {"svg": _svg(drawn, name, f"{caption} {told}"), "caption": caption}
            for name, drawn, caption, told in found
        ]


def _of_objectives(
    results: dict[str, Any], records: Records, *width: float
) -> list[tuple[str, Figure, str, str]]:
    """The pictures of several objectives: name, figure, caption, and in words what it shows."""
    told = ". ".join(
        f"{caption}: " + "; ".join(", ".join(line) for line in [header, *lines])
        for caption, header, lines in objective_tables(results)
    )
    found: list[tuple[str, Figure | None, str, str]] = [
        ("trade_off", trade_off(results, *width), "What the rules reach on each objective.", told),
        (
            "objective_weights", objective_weights(results, records, *width),
            "The effective weight of each objective in the updates.", "",
        ),
    ]  # fmt: skip
    for rule in records:
        for fact, what in FACTS.items():
            drawn = rule_facts(results, records, rule, fact, *width)
            name = re.sub(r"[^\w.-]+", "-", f"{fact}-{rule}")
            found.append((name, drawn, f"The {what} of each objective, by which {rule} goes.", ""))
    return [(name, drawn, *more) for name, drawn, *more in found if drawn is not None]  # type: ignore[misc]


def _validated(run: Sequence[Record]) -> list[float]:
    return [r.validation for r in run if r.validation is not None and r.validation == r.validation]


def _svg(figure: Figure, name: str, text: str) -> Any:
    """A figure as an ``<svg>`` element of its own ids, that scales, and that is told in words."""
    from markupsafe import Markup, escape

    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    drawn = stream.getvalue()
    drawn = re.sub(
        r"<metadata>.*?</metadata>\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL
    )
    head, rest = drawn.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    rest = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", rest)
    title = f'<title id="{name}-title">{escape(text)}</title>'
    return Markup(f'{head} role="img" aria-labelledby="{name}-title">{title}{rest}')


def _settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Each setting with its default, those that differ first."""
    try:
        usual = TrainConfig.of(config["dataset"]).as_dict() | {"dataset": TrainConfig.dataset}
        following = TrainConfig.of(
            **{name: config[name] for name in ("dataset", "iterations", "share")}
        )
        usual |= {name: getattr(following, name) for name in ("validate_every", "meta_batch")}
    except (InputError, LookupError, TypeError, ValueError):
        usual = {}
    lines = []
    for name, value in config.items():
        default = usual.get(name, "")
        cells = [name.replace("_", "-"), _plain(value), _plain(default)]
        lines.append({"cells": cells, "changed": bool(usual) and value != default})
    return sorted(lines, key=lambda line: not line["changed"])


def _environment(found: dict[str, Any]) -> list[list[str]]:
    versions = found.get("versions", {})
    told = {k: v for k, v in found.items() if k not in ("versions", "command")}
    return [[name, _plain(value)] for name, value in {**told, **versions}.items()]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _commands(results: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """What was typed; what gives every setting; and the runs by themselves."""
    found = []
    if given := results["environment"].get("command"):
        found.append({"what": "The command that was given:", "text": str(given)})
    try:
        config = TrainConfig.from_dict(results["config"], "results.json")
    except InputError:  # of another version
        return found
    rules, seeds = list(results["rules"]), [one["seed"] for one in _seeds(results)]
    numbers = ",".join(map(str, seeds)) + "," * (len(seeds) == 1)
    words = ["gametalearn", "compare", *flags_of(config, ("rule", "seed"))]
    words += ["--rules", ",".join(rules)]
    words += ["--seeds", str(len(seeds)) if seeds == list(range(len(seeds))) else numbers]
    words += ["--episodes", str(results["episodes"])]
    if primary := results.get("primary"):
        words += ["--primary", ",".join(primary)]
    singles = results.get("single", {})
    given = {name: one["runs"] for name, one in singles.items() if one["runs"]}
    if singles:
        text = ",".join(f"{name}={runs}" for name, runs in given.items())
        words += ["--single", *([text] if given else [])]
    what = "The same from its settings, with every one that is not a default:"
    handed = [k for k, v in results["config"].items() if is_handed_in(str(v))]
    if handed:
        what = f"Handed in, in Python: {', '.join(handed)}; all else is given by:"
    found.append({"what": what, "text": shlex.join([*words, "--out", str(folder)])})
    if handed:
        return found
    runs = [
        Planned(rule, config.of_rule(rule, seed), place_of(folder, rule, seed))
        for seed in seeds
        for rule in rules
    ]
    if singles and len(config.datasets) > 1:
        terms = Terms(dict.fromkeys(rules), episodes=results["episodes"])
        runs += single_runs(config, given or True, seeds, folder, terms)
        runs.sort(key=lambda run: seeds.index(run.config.seed))
    what = "Run by run, for the queue of a cluster; the command above then collects them:"
    found.append({"what": what, "text": "\n".join(commands_of(runs))})
    return found
