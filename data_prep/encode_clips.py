"""Encode clips and captions once, into the cache; run again to continue.

    python data_prep/encode_clips.py --config style.yaml [--section.key VALUE ...]

The same as `mochi-lora encode`.
"""

import sys

from mochi_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
