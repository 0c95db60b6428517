"""``python -m cmacc``, as launchers start it: ``torchrun -m cmacc pretrain``."""

import sys

from cmacc.cli import main

sys.exit(main())
