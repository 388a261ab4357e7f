"""How a command was called: the command it names as next has to be called with the same file and the same overrides."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from mochi_lora.console import console


@dataclass(frozen=True)
class Called:
    """The configuration file as it was typed, and the overrides; from Python neither is known."""

    config: str | None = None
    overrides: tuple[str, ...] = ()

    def also(self, overrides: Sequence[str]) -> "Called":
        """With these overrides after its own: a later one wins."""
        return Called(self.config, (*self.overrides, *overrides))

    def say_next(self, command: str, note: str = "") -> None:
        """Print the line that names the next command, fit to be pasted into a shell."""
        file = "<the same file>" if self.config is None else shlex.quote(self.config)
        words = ["mochi-lora", command, "--config", file, shlex.join(self.overrides)]
        console.print(f"next     {' '.join(filter(None, words))}{note and f'   {note}'}", markup=False)
