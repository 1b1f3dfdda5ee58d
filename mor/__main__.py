"""`python -m mor` is the `mor` command."""

import sys

from mor.cli import main

if __name__ == "__main__":
    sys.exit(main())
