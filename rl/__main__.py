"""`python -m rl` is the command `rl`."""

import sys

from rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
