"""`mochi-lora inspect`: the cache as a table, every entry checked, and samples decoded back to video."""

from collections import Counter
from pathlib import Path

import torch

from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import Index, IndexEntry, index_path, read_index, read_sample
from mochi_lora.engine.plan import resolve_device
from mochi_lora.errors import DamagedFileError
from mochi_lora.inference.video import to_uint8, video_name, write_contact_sheet, write_mp4
from mochi_lora.runs.decoder import load_decoder

_CAPTION_WIDTH = 60


def run(config: Config, *, decode: int, output: Path | None) -> None:
    """Tabulate and check the data set's entries, decode the first `decode` whole ones. DamagedFileError if any is damaged."""
    index = read_index(config.data)
    cache = Cache(config.data.cache)
    whole, damaged = _check(index, cache)
    if decode and whole:
        _decode(config, cache, whole[:decode], output or config.data.cache / "decoded")
    if damaged:
        message = "\n".join([f"{len(damaged)} damaged entries:", *(f"  {line}" for line in damaged)])
        raise DamagedFileError(message)


def _check(index: Index, cache: Cache) -> tuple[list[IndexEntry], list[str]]:
    """(entries training can read, what is wrong with each of the others)."""
    rows, whole, damaged, size = [], [], [], 0.0
    with progress_bar() as bar:
        for entry in bar.track(index.entries, description="checking"):
            try:
                sample = read_sample(cache, entry)
            except DamagedFileError as error:
                damaged.append(str(error))
                continue
            whole.append(entry)
            spread = float(sample.posterior.mean.float().std())
            kib = (cache.path("latents", entry.latents).stat().st_size + cache.path("text", entry.text).stat().st_size) / 2**10
            size += kib
            caption = entry.caption if len(entry.caption) <= _CAPTION_WIDTH else f"{entry.caption[:_CAPTION_WIDTH]}..."
            rows.append((entry.clip, entry.bucket, entry.split, sample.text.length, f"{spread:.2f}", f"{kib:,.0f}", caption))
    print_table("samples", ("clip", "bucket", "split", "tokens", "latent std", "KiB", "caption"), rows)
    shapes = Counter(entry.bucket for entry in index.entries)
    total = ", ".join(f"{count} x {shape}" for shape, count in sorted(shapes.items()))
    console.print(f"{len(index.entries)} samples ({total}), {size / 2**10:.1f} MiB, {len(damaged)} damaged")
    return whole, damaged


def _decode(config: Config, cache: Cache, entries: list[IndexEntry], folder: Path) -> None:
    """The posterior mean back to pixels: what training sees, up to the VAE's own loss."""
    vae = load_decoder(config, torch.device(resolve_device(config.engine.device)))
    rows = []
    for number, entry in enumerate(entries):
        frames = to_uint8(vae.decode(cache.read_latents(entry.latents).mean.float()).cpu())
        path = folder / video_name(number, Path(entry.clip).stem, 0)
        write_mp4(path, frames)
        console.print(f"video    {path}", markup=False)
        rows.append((f"{entry.clip} {entry.bucket}", frames))
    write_contact_sheet(folder / "sheet.png", rows)
    console.print(f"sheet    {folder / 'sheet.png'}  (index {index_path(config.data)})", markup=False)
