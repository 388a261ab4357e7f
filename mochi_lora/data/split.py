"""Which clips are held out for the validation loss: whole videos, so that no clip is judged by another of its own film."""

from collections.abc import Iterable


def validation_sources(digests: Iterable[str], fraction: float) -> set[str]:
    """SHA-256 of the source files that are held out: `fraction` of them, rounded, one at least if any are asked for.

    The smallest digests are taken, so adding a clip moves few others across. A source is never on both sides, and a
    single source is never held out.
    """
    known = sorted(set(digests))
    if fraction == 0 or len(known) < 2:
        return set()
    return set(known[: min(len(known) - 1, max(1, round(fraction * len(known))))])


def video_of(clips: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """SHA-256 of each file -> SHA-256 that stands for its video (the smallest of those that belong together).

    `clips` gives each clip's file and the video that this was cut from, if known: a path or a SHA-256, as the column
    `source` of a table has it. Files of one video belong together, and with the video itself if its SHA-256 is named.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    digests = set()
    for digest, video in clips:
        digests.add(digest)
        one, other = root(digest), root(video or digest)
        parent[other] = one
    members: dict[str, list[str]] = {}
    for digest in digests:
        members.setdefault(root(digest), []).append(digest)
    return {digest: min(group) for group in members.values() for digest in group}
