"""Pack Omniglot for gametalearn; the same as `gametalearn data prepare omniglot`."""

import argparse
import sys
from pathlib import Path

from gametalearn.data import data_root, prepare_omniglot
from gametalearn.errors import InputError


def main() -> None:
    """Parse the arguments and pack; exit status 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source",
        type=Path,
        help="folder with images_background.zip and images_evaluation.zip, or with the folders of "
        "the same names (default: download with torchvision)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=data_root(),
        help="data root to write to (default: $GAMETALEARN_DATA or %(default)s)",
    )
    options = parser.parse_args()
    try:
        print(prepare_omniglot(options.root, options.source))
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
