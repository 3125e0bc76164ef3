"""``python -m fusedrnn`` is the command line."""

import sys

from fusedrnn.cli import main

sys.exit(main())
