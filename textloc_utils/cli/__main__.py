"""``python -m textloc_utils.cli``."""

import sys

from textloc_utils.cli import main

sys.exit(main())
