"""Tokens per second in the engine: `mor bench throughput` as a script of this folder.

python -m bench.throughput --help
"""

import sys

from mor.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "throughput", *sys.argv[1:]]))
