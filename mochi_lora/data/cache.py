"""The cache of encoded samples: sole owner of its keys, file names, schema and checksums.

    <cache>/latents/<key>.safetensors   mean, logvar: bf16 [C, T, H, W], raw VAE space
    <cache>/text/<key>.safetensors      tokens: bf16 [L, D], padding cut off
    <cache>/index/<data set>.json       what belongs to one data set (`data.index`); derived, rebuilt by encoding again

Latents and text are separate entries, so that fixing a caption does not encode a video again. A key is a digest of
everything that shapes the content, but for the last bits of a text, in which it shows what it was batched with; content never
changes under a key, so writers need no lock. Entries are written by rename, carry the digest of their own content, and are
checked at every read.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mochi_lora.data.geometry import crop_plan
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.errors import DamagedFileError
from mochi_lora.files import digest_of, write_atomic
from mochi_lora.spec import Bucket

SCHEMA = 1
PREPROCESSING = 2  # counts changes to frame choice, resizing or cropping: each makes new keys
_KEY_DIGITS = 32
Kind = Literal["latents", "text"]


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder, at which precision, made an entry."""

    fingerprint: str
    precision: str


@dataclass(frozen=True)
class ClipRange:
    """The part of one source file that becomes one sample."""

    source_sha256: str
    start: float  # seconds
    end: float | None  # seconds; None is the end of the file
    width: int  # pixels of the source as displayed, or of the region cut out of it
    height: int
    bucket: Bucket
    region: tuple[int, int, int, int] | None = None  # left, top, right, bottom; None is the whole picture


def latents_key(clip: ClipRange, vae: EncoderIdentity) -> str:
    """Key of a clip's posterior."""
    content = {
        "schema": SCHEMA,
        "preprocessing": PREPROCESSING,
        "source": clip.source_sha256,
        "range": [clip.start, clip.end],
        "bucket": str(clip.bucket),
        "crop": crop_plan(clip.width, clip.height, clip.bucket),
        "vae": [vae.fingerprint, vae.precision],
    }
    if clip.region is not None:  # else the keys of clips without one would change
        content["region"] = list(clip.region)
    return digest_of(content)[:_KEY_DIGITS]


def text_key(caption: str, text: EncoderIdentity) -> str:
    """Key of a caption's embedding; captions are compared without surrounding white space, as T5 gets them."""
    content = {"schema": SCHEMA, "caption": caption.strip(), "text": [text.fingerprint, text.precision]}
    return digest_of(content)[:_KEY_DIGITS]


@dataclass(frozen=True)
class Cache:
    """A folder of entries."""

    root: Path

    def path(self, kind: Kind, key: str) -> Path:
        """File of one entry, there or not."""
        return self.root / kind / f"{key}.safetensors"

    def holds(self, kind: Kind, key: str) -> bool:
        """Whether the entry was written; only a read checks its content."""
        return self.path(kind, key).exists()

    def write_latents(self, key: str, posterior: Posterior, about: dict[str, Any]) -> None:
        """Store a posterior as bf16; `about` is for people (source, bucket, seconds)."""
        self._write("latents", key, {"mean": posterior.mean, "logvar": posterior.logvar}, about)

    def write_text(self, key: str, embedding: TextEmbedding, about: dict[str, Any]) -> None:
        """Store an embedding as bf16; `about` holds the caption and what the tokenizer said of it."""
        self._write("text", key, {"tokens": embedding.tokens}, about)

    def read_latents(self, key: str) -> Posterior:
        """The posterior, bf16. Raises DamagedFileError naming the file if it is not what was written."""
        tensors = self._read("latents", key)
        return Posterior(tensors["mean"], tensors["logvar"])

    def read_text(self, key: str) -> TextEmbedding:
        """The embedding, bf16. Raises DamagedFileError naming the file if it is not what was written."""
        return TextEmbedding(self._read("text", key)["tokens"])

    def _write(self, kind: Kind, key: str, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        text = json.dumps(about, sort_keys=True, ensure_ascii=False)
        header = {"schema": str(SCHEMA), "about": text, "digest": _digest(stored, text)}
        write_atomic(self.path(kind, key), lambda temporary: save_file(stored, temporary, metadata=header))

    def _read(self, kind: Kind, key: str) -> dict[str, torch.Tensor]:
        path = self.path(kind, key)
        advice = "delete the file and run encode again"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                header = file.metadata() or {}
        except FileNotFoundError as error:
            message = f"{path}: the index names this cache entry but it is not there; run encode again"
            raise DamagedFileError(message) from error
        except SafetensorError as error:
            message = f"{path}: damaged cache entry ({error}); {advice}"
            raise DamagedFileError(message) from error
        if header.get("schema") != str(SCHEMA):
            message = f"{path}: cache schema {header.get('schema')}, this version reads {SCHEMA}; {advice}"
            raise DamagedFileError(message)
        if header.get("digest") != _digest(tensors, header.get("about", "")):
            message = f"{path}: damaged cache entry (its content does not match its checksum); {advice}"
            raise DamagedFileError(message)
        return tensors


def _digest(tensors: dict[str, torch.Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
