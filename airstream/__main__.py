"""`python -m airstream` is `airstream`."""

import sys

from airstream.cli import main

sys.exit(main())
