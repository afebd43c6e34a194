"""``python -m lorafleet`` is the ``lorafleet`` command."""

import sys

from lorafleet.cli.main import main

sys.exit(main())
