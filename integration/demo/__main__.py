"""`python -m integration.demo`."""

import sys

from integration.demo import main

sys.exit(main())
