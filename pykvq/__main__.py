"""`python -m pykvq`: the same as the command `pykvq`."""

import sys

from pykvq.cli import main

sys.exit(main())
