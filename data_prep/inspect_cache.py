"""Tabulate the cache and decode samples back to video.

    python data_prep/inspect_cache.py --config style.yaml [--decode N] [--output DIR] [--section.key VALUE ...]

The same as `mochi-lora inspect`.
"""

import sys

from mochi_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
