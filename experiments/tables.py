"""Write the tables of this folder's pages anew from the results.json files below results/.

A table stands between two lines, ``<!-- table: results/NAME -->`` and ``<!-- end -->``. It is what `gametalearn
compare` prints, with the time of a meta-iteration; no number in it is typed by hand.

example:
  python experiments/tables.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gametalearn import InputError
from gametalearn.stored import read_results
from gametalearn.tables import rows, title

HERE = Path(__file__).parent
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(results: dict[str, Any]) -> str:
    """What was compared, a row for each rule with its cost, and what it was measured with."""
    header, lines = rows(results)
    cost = [_milliseconds(results, rule) for rule in results["rules"]]
    table = [
        [*header, "ms per iteration"],
        *([*line, ms] for line, ms in zip(lines, cost, strict=True)),
    ]
    written = ["| " + " | ".join(line) + " |" for line in table]
    written.insert(1, "|" + "---|" * len(table[0]))
    made = results["environment"]
    return "\n".join([
        f"{title(results)}.", "", *written, "",
        f"gametalearn {made['gametalearn']}, torch {made['versions']['torch']}, {made['device']}, "
        f"threads per run: {made['threads'] or 'all'}.", "",
    ])  # fmt: skip


def _milliseconds(results: dict[str, Any], rule: str) -> str:
    """The median over seeds of a meta-iteration's time, without validation and test."""
    each = sorted(one["seconds"] / results["iterations"] for one in results["rules"][rule]["seeds"])
    return f"{1000 * each[len(each) // 2]:.0f}"


def renewed(page: Path) -> str:
    """A page's text with its tables written anew.

    Raises:
        InputError: results that a table names are not there, or damaged.
    """
    return TABLE.sub(
        lambda found: (
            found[1] + "\n" + markdown(read_results(page.parent / found[2])) + "\n" + found[3]
        ),
        page.read_text(encoding="utf-8"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="*", default=sorted(HERE.glob("*.md")),
                        help="Markdown files (default: all of this folder)")  # fmt: skip
    try:
        for page in parser.parse_args(argv).pages:
            page.write_text(renewed(page), encoding="utf-8")
    except InputError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
