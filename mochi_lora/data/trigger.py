"""What it means that a caption calls the trigger. Sole owner: what puts it in, what counts it and what marks it must agree."""

import re


def called(trigger: str) -> re.Pattern[str]:
    """Finds `trigger` in captions: whole words ("ink" is not in "pink"), in any case, however their words are spaced."""
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, trigger.split())) + r"(?!\w)", re.IGNORECASE)


def calls(caption: str, trigger: str) -> bool:
    """Whether `caption` holds `trigger`; every caption holds an empty one."""
    return not trigger.strip() or called(trigger).search(caption) is not None


def called_parts(caption: str, trigger: str) -> list[tuple[str, bool]]:
    """`caption` in pieces, each with whether it is the trigger."""
    if not trigger.strip():
        return [(caption, False)]
    pieces, at = [], 0
    for found in called(trigger).finditer(caption):
        pieces += [(caption[at : found.start()], False), (found[0], True)]
        at = found.end()
    return [(piece, calling) for piece, calling in [*pieces, (caption[at:], False)] if piece]
