"""`python -m lcm`."""

import sys

from lcm.cli import main

if __name__ == "__main__":
    sys.exit(main())
