"""Have a vision-language model write captions; correct them in captions.jsonl and run again.

    python data_prep/caption_clips.py --config style.yaml [--section.key VALUE ...]

The same as `mochi-lora caption`.
"""

import sys

from mochi_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["caption", *sys.argv[1:]]))
