"""Errors meant for people.

A `UserError` message says what we got, where it came from, what was expected and what to change. The command line prints
it without a traceback and exits non-zero. Broken invariants of our own are `assert`s and keep their traceback.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[1] / "pyproject.toml"  # not there beside an installed package


class UserError(ValueError):
    """Something a person can mend: a setting, a file, a command."""


class ClipError(UserError):
    """One clip cannot be used. The encoder records it and goes on with the next clip; nothing else catches it."""


class DamagedFileError(UserError):
    """A file of ours (cache entry, checkpoint) does not hold what was written into it."""


def install_command(extra: str | None = None) -> str:
    """What to type for all that this package wants, or one of its extras: a checkout is installed as it lies there."""
    if _CHECKOUT.is_file():
        return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
    return f"pip install 'mochi-lora[{extra}]'" if extra else "pip install --upgrade mochi-lora"
