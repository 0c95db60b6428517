"""``python -m cmacc``; launchers start it so: ``torchrun -m cmacc pretrain``, ``accelerate launch -m cmacc pretrain``."""

import sys

from cmacc.cli import main

sys.exit(main())
