"""Draw the README's picture: python docs/scripts/plot_demo.py runs/demo docs/figures/demo.png

Each rule's difference from uniform in a comparison, on every seed and in the mean, with its 95% interval.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gametalearn.canvas import drawing
from gametalearn.figures import differences
from gametalearn.stored import read_results

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Draw a comparison's folder into a file."""
    folder, picture = map(Path, argv[1:])
    with drawing():
        differences(read_results(folder), width=6.4).savefig(picture, dpi=140)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
