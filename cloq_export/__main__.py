"""`python -m cloq_export` is `cloq`."""

import sys

from cloq_export.cli import main

sys.exit(main())
