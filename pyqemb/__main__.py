"""The entry point of `python -m pyqemb` and `torchrun -m pyqemb`."""

import sys

from pyqemb.cli import main

sys.exit(main())
