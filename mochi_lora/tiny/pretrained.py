"""The trained mochi-tiny: where it lies in the package, and copies of it for people to use."""

import shutil
from pathlib import Path

from mochi_lora.data.whole_folder import write_whole
from mochi_lora.errors import UserError
from mochi_lora.files import digest_of
from mochi_lora.model.base import TINY_MARKER, fingerprint

WEIGHTS = Path(__file__).parent / "weights"  # a diffusers folder, as `mochi_lora.tiny.pretrain` writes it, with its model card
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


def write_pretrained(folder: Path) -> Path:
    """Copy mochi-tiny to `folder` and return it; the folder is there whole or not at all.

    A folder that already holds these weights is kept. Any other non-empty folder raises UserError, mochi-tiny of another
    release among them, and so does an installation without the weights.
    """
    if not (WEIGHTS / "model_index.json").is_file():
        message = f"this installation lacks mochi-tiny's weights, expected in {WEIGHTS}"
        raise UserError(f"{message}; install mochi-lora again, or take random ones: mochi-lora tiny FOLDER --random 0")
    marker = {"version": 1, "pretrained": digest_of([fingerprint(WEIGHTS / part) for part in _PARTS])[:16]}
    return write_whole(folder, marker=TINY_MARKER, content=marker, what="this release's mochi-tiny", fill=_copy)


def _copy(draft: Path) -> None:
    """Contents only: the package's files may be read-only, the copy is the user's."""
    for source in sorted(path for path in WEIGHTS.rglob("*") if path.is_file()):
        target = draft / source.relative_to(WEIGHTS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
