"""Which clips are held out for the validation loss: whole videos, so that no clip is judged by another of its own film."""

from collections import Counter
from collections.abc import Iterable

_MOST = 0.5  # of the clips, where no larger fraction is asked for: with few videos, even the smallest may be a large share


def clips_to_hold_out(clips: int, fraction: float) -> int:
    """What `fraction` asks for: rounded, one at least if any are asked for."""
    return max(1, round(fraction * clips)) if fraction else 0


def validation_sources(videos: Iterable[str], fraction: float) -> set[str]:
    """The videos that are held out; `videos` names each clip's (SHA-256), so as often as it gives clips.

    Videos are taken in the order of their digests while their clips fit into `fraction` of all, so that a video added later
    moves few others across; what then is missing comes from the smallest video left, if that is nearer to the fraction
    or if none is held out yet. One video at least stays for training, and more than half of the clips are never held
    out unless so many are asked for.
    """
    sizes = Counter(videos)
    wanted = clips_to_hold_out(sizes.total(), fraction)
    held: set[str] = set()
    count = 0
    for video in sorted(sizes):
        if count + sizes[video] <= wanted and len(held) < len(sizes) - 1:
            held.add(video)
            count += sizes[video]
    left = sorted(sizes.keys() - held, key=lambda video: (sizes[video], video))
    if wanted == 0 or len(left) < 2:
        return held
    more = count + sizes[left[0]]
    if (more - wanted < wanted - count or not held) and more <= max(wanted, _MOST * sizes.total()):
        held.add(left[0])
    return held


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
