"""A training set without clips, VAE or T5: random posteriors and captions straight into a cache, and the run they feed."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from mochi_lora.config.load import load_config
from mochi_lora.config.schema import Config
from mochi_lora.data.cache import Cache, EncoderIdentity, text_key
from mochi_lora.data.index import Index, IndexEntry, write_index
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.model.base import fingerprint
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.tiny import TEXT_WIDTH
from mochi_lora.model.vae import MochiVae
from mochi_lora.spec import Bucket

SMALL, WIDE = "7x32x48", "7x32x64"
PROMPT = "a lighthouse"


def write_config(path: Path, tiny: Path, **sections: dict) -> Path:
    """A configuration file beside which everything of the run lies; quiet, fp32, no loader processes, no videos."""
    root = path.parent
    base = {
        "run": {"folder": str(root / "run"), "seed": 7},
        "model": {"base": str(tiny)},
        "data": {"clips": str(root / "clips"), "cache": str(root / "cache"), "buckets": [SMALL, WIDE], "loader_workers": 0},
        "adapter": {"rank": 4, "alpha": 8},
        "objective": {},
        "train": {
            "steps": 6,
            "warmup_steps": 1,
            "learning_rate": 1e-3,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 0,
            "validation_bands": 2,
            "sample_every": 0,
        },
        "engine": {"device": "cpu", "precision": "fp32", "checkpointing": "none"},
        "sample": {"prompts": [PROMPT], "frames": 7, "height": 32, "width": 48, "steps": 2, "guidance": 2.0},
        "tracking": {"trackers": []},
    }
    for name, section in sections.items():
        base[name] |= section
    path.write_text(yaml.safe_dump(base))
    return path


def posterior(bucket: str, seed: int) -> Posterior:
    """Means of the published latents' spread, a small variance."""
    shape = Bucket.parse(bucket).latent_shape
    return Posterior(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.full(shape, -6.0))


def embedding(length: int, seed: int) -> TextEmbedding:
    return TextEmbedding(torch.randn(length, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed)))


def latents_name(number: int) -> str:
    return f"{number:032d}"


def write_data(config: Config, *, clips: int = 6, held_out: int = 2) -> Index:
    """Clips `clip-0.mp4`...; every third has the other bucket; captions of one to five tokens; the prompts of `sample`."""
    cache, base = Cache(config.data.cache), Path(config.model.base)
    vae = EncoderIdentity(fingerprint(base / "vae"), "fp32")
    text = EncoderIdentity(f"{fingerprint(base / 'text_encoder')}-{fingerprint(base / 'tokenizer')}", "bf16")
    stats = MochiVae.stats_of(base / "vae")
    entries = []
    for number in range(clips + held_out):
        bucket, caption = (WIDE if number % 3 == 2 else SMALL), f"caption {number}"
        cache.write_latents(latents_name(number), posterior(bucket, number), {})
        cache.write_text(text_key(caption, text), embedding(1 + number % 5, number), {})
        split = "train" if number < clips else "validation"
        name = f"clip-{number}.mp4"
        keys = latents_name(number), text_key(caption, text)
        entries.append(IndexEntry(name, f"{number:064d}", bucket, *keys, caption, split))
    cache.write_text(text_key(PROMPT, text), embedding(3, 99), {})
    cache.write_text(text_key("", text), embedding(0, 0), {})
    index = Index(config.model.base, config.model.revision, vae, text, stats.mean, stats.std, stats.scale, tuple(entries))
    write_index(config.data, index)
    return index


def make_run(folder: Path, tiny: Path, *, clips: int = 6, held_out: int = 2, **sections: dict) -> Path:
    """Data and configuration of a run under `folder`; returns the configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder / "run.yaml", tiny, **sections)
    write_data(load_config(path, []), clips=clips, held_out=held_out)
    return path


def unit_stats() -> LatentStats:
    return LatentStats((0.0,) * 12, (1.0,) * 12)


def records(run: Path, kind: str = "train") -> list[dict]:
    """metrics.jsonl of one kind, without its name and the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = "kind", "time"
    return [
        {key: value for key, value in line.items() if not key.startswith(left_out)} for line in lines if line["kind"] == kind
    ]


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit for bit; headers name paths and may differ."""
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def counterpart(name: Path, run: Path) -> Path:
    """What a file of another run, `name` relative to it, is called in `run`: ComfyUI's copy of the card has the run's name."""
    return name.with_name(f"{run.name}.safetensors") if name.parts[:2] == ("publish", "comfyui") and name.suffix else name


def distance(first: Path, second: Path) -> float:
    """Largest difference between two adapter files."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())
