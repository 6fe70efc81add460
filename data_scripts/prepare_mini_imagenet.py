"""Pack mini-ImageNet for gametalearn; the same as `gametalearn data prepare mini-imagenet`."""

import argparse
import sys
from pathlib import Path

from gametalearn.data import data_root, prepare_mini_imagenet
from gametalearn.errors import InputError


def main() -> None:
    """Parse the arguments and pack; exit status 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="folder with train.csv, val.csv, test.csv and images/ or images.zip; or with train/, "
        "val/, test/ of class folders; or with mini-imagenet-cache-{train,val,test}.pkl",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=data_root(),
        help="data root to write to (default: $GAMETALEARN_DATA or %(default)s)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out unreadable images, naming each"
    )
    options = parser.parse_args()
    try:
        print(prepare_mini_imagenet(options.root, options.source, options.skip_bad))
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
