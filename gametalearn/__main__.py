"""``python -m gametalearn``, for torchrun and for where the console script is not on the path."""

import sys

from gametalearn.cli import main

sys.exit(main())
