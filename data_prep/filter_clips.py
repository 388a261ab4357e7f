"""Leave out black, dark, static, blurred, flickering and duplicate clips, by the limits of the section `filter`.

    python data_prep/filter_clips.py --config style.yaml [--section.key VALUE ...]

The same as `mochi-lora prepare --only filter`.
"""

import sys

from mochi_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "--only", "filter", *sys.argv[1:]]))
