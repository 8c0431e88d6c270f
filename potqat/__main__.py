"""``python -m potqat``: the same as the ``potqat`` command."""

import sys

from potqat.cli import main

sys.exit(main())
