"""`python -m vitlab`, which `torchrun -m vitlab train` needs."""

import sys

from vitlab.cli import main

sys.exit(main())
