"""`python -m stemtune.cli`, the same as the command `stemtune`."""

import sys

from stemtune.cli import main

sys.exit(main())
