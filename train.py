"""Train an adapter on cached samples; run again to continue.

    accelerate launch train.py --config style.yaml [--fresh] [--section.key VALUE ...]

The same as `mochi-lora train`, as a file that launchers (accelerate, torchrun) can start.
"""

import sys

from mochi_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
