"""Raw footage to clips: shots, then ranges of a legal length from each; run again to continue.

    python data_prep/split_scenes.py --config style.yaml [--section.key VALUE ...]

The same as `mochi-lora prepare --only split`.
"""

import sys

from mochi_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "--only", "split", *sys.argv[1:]]))
