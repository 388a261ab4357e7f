"""The index of one data set: which cache entries belong to it, and which encoders made them. Derived from an encode run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mochi_lora.config.schema import DataConfig
from mochi_lora.data.cache import SCHEMA, Cache, EncoderIdentity, text_key
from mochi_lora.data.mix import where_of
from mochi_lora.data.samples import CachedSample
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import digest_of, write_json
from mochi_lora.spec import Bucket

Split = Literal["train", "validation"]
_NAME_DIGITS = 12


@dataclass(frozen=True)
class IndexEntry:
    """One sample: its name for people, its keys in the cache, its shape and its side of the split."""

    clip: str
    source_sha256: str
    bucket: str
    latents: str
    text: str
    caption: str
    split: Split
    part: int = 0  # entry of data.mix that it came with


@dataclass(frozen=True)
class Index:
    """A data set as `encode` left it."""

    base: str  # model.base and model.revision of the encoders
    revision: str | None
    vae: EncoderIdentity
    text: EncoderIdentity
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    latents_scale: float
    entries: tuple[IndexEntry, ...]

    def of(self, split: Split) -> list[IndexEntry]:
        """Entries of one side, in stored order."""
        return [entry for entry in self.entries if entry.split == split]

    def digest(self) -> str:
        """Identity of the data: any clip, caption, encoder, split or part that differs changes it; where files lie does not."""
        entries = [
            [entry.latents, entry.text, entry.bucket, entry.split, *([entry.part] if entry.part else [])]  # as before parts
            for entry in self.entries
        ]
        stats = [self.latents_mean, self.latents_std, self.latents_scale]
        return digest_of([asdict(self.vae), asdict(self.text), stats, entries])[:_NAME_DIGITS]


def index_path(data: DataConfig) -> Path:
    """One file per data set, so that several can share a cache. Repeats and weights are training's: they make no other."""
    content: list[Any] = [str(data.clips.resolve()), data.buckets, data.upscale, data.validation_fraction]
    if data.mix:
        content.append([[str(part.clips.resolve()), part.buckets, part.upscale, part.trigger] for part in data.mix])
    return data.cache / "index" / f"{digest_of(content)[:_NAME_DIGITS]}.json"


def write_index(data: DataConfig, index: Index) -> Path:
    """Write the index atomically; returns its path."""
    path = index_path(data)
    clips = [str(part.clips) for part in data.mix] or str(data.clips)
    write_json(path, {"schema": SCHEMA, "clips": clips, **_to_json(index)})
    return path


def read_index(data: DataConfig) -> Index:
    """Raises UserError when this data set was never encoded, DamagedFileError when the file does not parse."""
    path = index_path(data)
    if not path.exists():
        message = (
            f"{data.cache}: no index for {where_of(data)} with buckets {', '.join(data.buckets)}; "
            "run `mochi-lora encode` with this configuration first"
        )
        raise UserError(message)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path}: damaged index ({error}); run encode again, entries already encoded are kept"
        raise DamagedFileError(message) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        message = f"{path}: cache schema {schema}, this version reads {SCHEMA}; run encode again"
        raise DamagedFileError(message)
    try:
        return _from_json(content)
    except (KeyError, TypeError) as error:
        message = f"{path}: damaged index ({error}); run encode again, entries already encoded are kept"
        raise DamagedFileError(message) from error


def read_sample(cache: Cache, entry: IndexEntry) -> CachedSample:
    """One training item. Raises DamagedFileError if an entry is damaged or of another shape than the index says."""
    bucket = Bucket.parse(entry.bucket)
    posterior = cache.read_latents(entry.latents)
    if tuple(posterior.mean.shape) != bucket.latent_shape:
        path = cache.path("latents", entry.latents)
        message = f"{path}: latents of shape {tuple(posterior.mean.shape)}, expected {bucket.latent_shape} for {bucket}"
        raise DamagedFileError(f"{message}; delete the file and run encode again")
    return CachedSample(entry.clip, bucket, posterior, cache.read_text(entry.text))


def prompt_key(index: Index, prompt: str) -> str:
    """Cache key of a sample prompt, embedded by the same text encoder as the captions."""
    return text_key(prompt, index.text)


def _from_json(content: dict[str, Any]) -> Index:
    return Index(
        base=content["base"],
        revision=content["revision"],
        vae=EncoderIdentity(**content["vae"]),
        text=EncoderIdentity(**content["text"]),
        latents_mean=tuple(content["latents_mean"]),
        latents_std=tuple(content["latents_std"]),
        latents_scale=content["latents_scale"],
        entries=tuple(IndexEntry(**entry) for entry in content["entries"]),
    )


def _to_json(index: Index) -> dict[str, Any]:
    return asdict(index)
