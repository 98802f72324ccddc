"""`python -m pyqemb`, and so `torchrun -m pyqemb`."""

import sys

from pyqemb.cli import main

sys.exit(main())
