"""`python -m dcp_storage`."""

import sys

from dcp_storage.cli import main

if __name__ == "__main__":
    sys.exit(main())
