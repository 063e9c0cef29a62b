#!/usr/bin/env python3
"""Scalpel's developer tool: ``python dev.py demo``, ``test``, ``lint``, ``serve``, ``bench``, ``python``.

Any Python 3.10 or newer starts it, on Linux, macOS and Windows; what it needs beyond that it makes itself,
in a cache folder outside this checkout (see ``devtools/environment.py``).
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("dev.py needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

from devtools.cli import main

if __name__ == "__main__":
    sys.exit(main())
