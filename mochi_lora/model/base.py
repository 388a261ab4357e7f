"""Where the pretrained model lies, and what identifies it."""

import hashlib
from pathlib import Path

from mochi_lora.errors import UserError

TINY_MARKER = "tiny.json"  # in a folder that holds mochi-tiny, trained or random: which one it is
_CHUNK = 1 << 16
_SAMPLES = 64


def locate(base: str, revision: str | None, component: str) -> Path:
    """Folder of one component (`transformer`, `vae`, `text_encoder`, `tokenizer`) of a local folder or a hub id.

    A hub id is downloaded once into Hugging Face's own cache, as by `mochi-lora download`. Raises UserError naming what is
    missing.
    """
    local = Path(base)
    if local.is_dir():
        folder = local / component
        if not folder.is_dir():
            message = f"model.base: {base} has no folder {component}; expected a diffusers layout with {component}/ inside"
            raise UserError(message)
        return folder
    require_hub_id(base)
    from mochi_lora.model.fetch import cached_component  # noqa: PLC0415 - a local folder needs no hub client

    return cached_component(base, revision, component)


def require_hub_id(base: str) -> None:
    """Raises UserError for what cannot be OWNER/NAME, before the hub is asked for it."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - a local folder needs no hub client
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    try:
        validate_repo_id(base)
        legal = "/" in base
    except HFValidationError:
        legal = False
    if not legal:
        message = f"model.base: {base} is neither a local folder nor a hub id (OWNER/NAME); check the path"
        raise UserError(message)


def fingerprint(folder: Path) -> str:
    """Identity of a component's files: 16 hexadecimal digits.

    Hashes every small file whole; of a weights file its size, its first 64 KiB (the safetensors header) and 64 chunks
    spread evenly: telling T5-XXL from a fine-tune of it must not take minutes. It tells models apart; it is no checksum.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors", ".model"))
    if not files:
        message = f"{folder}: no .json or .safetensors file; expected a diffusers component folder"
        raise UserError(message)
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for offset in _offsets(size):
                stream.seek(offset)
                digest.update(stream.read(_CHUNK))
    return digest.hexdigest()[:16]


def _offsets(size: int) -> list[int]:
    if size <= _CHUNK * _SAMPLES:
        return list(range(0, size, _CHUNK))
    return [index * (size - _CHUNK) // (_SAMPLES - 1) for index in range(_SAMPLES)]  # first and last chunk included
