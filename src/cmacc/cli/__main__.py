"""``python -m cmacc.cli``."""

import sys

from cmacc.cli.commands import main

sys.exit(main())
