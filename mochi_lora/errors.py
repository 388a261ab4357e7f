"""Errors meant for people.

A `UserError` message says what we got, where it came from, what was expected and what to change. The command line prints
it without a traceback and exits non-zero. Broken invariants of our own are `assert`s and keep their traceback.
"""


class UserError(ValueError):
    """Something a person can mend: a setting, a file, a command."""


class ClipError(UserError):
    """One clip cannot be used. The encoder records it and goes on with the next clip; nothing else catches it."""


class DamagedFileError(UserError):
    """A file of ours (cache entry, checkpoint) does not hold what was written into it."""
