"""What a data set amounts to, in numbers that tell nothing of its files: for an adapter's header and its card."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mochi_lora.data.index import IndexEntry
from mochi_lora.spec import Bucket


def data_statistics(training: Sequence[IndexEntry], held_out: Sequence[IndexEntry]) -> dict[str, Any]:
    """Clips, images, seconds, source files, buckets and captions of the training side, and how many clips are held out.

    Seconds as trained on: `Bucket.seconds`, 0 for an image. `caption_words` is (fewest, median, most).
    """
    buckets = Counter(entry.bucket for entry in training)
    shapes = {name: Bucket.parse(name) for name in buckets}
    words = [len(entry.caption.split()) for entry in training]
    return {
        "clips": len(training),
        "images": sum(count for name, count in buckets.items() if shapes[name].frames == 1),
        "seconds": round(sum(shapes[name].seconds * count for name, count in buckets.items()), 2),
        "sources": len({entry.source_sha256 for entry in training}),
        "buckets": {name: buckets[name] for name in sorted(buckets, key=shapes.__getitem__)},
        "captions": len({entry.caption for entry in training}),
        "caption_words": [min(words), statistics.median(words), max(words)] if words else [],
        "held_out": len(held_out),
    }
