"""`python -m mochi_lora` is the `mochi-lora` program."""

from mochi_lora.cli import entry

if __name__ == "__main__":
    entry()
