"""What must not change when a run goes on, and what to say when it did."""

from pathlib import Path
from typing import Any

from mochi_lora.config.schema import Config
from mochi_lora.data.index import Index
from mochi_lora.errors import UserError
from mochi_lora.model.base import fingerprint

BASE = "base model fingerprint"
_SAMPLES = "samples per step (batch_size x gradient_accumulation x data ranks)"
_FORMER_NAMES = {"samples per step (batch_size x gradient_accumulation x processes)": _SAMPLES}  # in runs begun before


def run_identity(config: Config, index: Index, base_fingerprint: str, samples_per_step: int) -> dict[str, Any]:
    """Data, seed, base, adapter and objective, flat, by the name a person would look for."""
    adapter = config.adapter.model_dump(mode="json")
    objective = config.objective.model_dump(mode="json")
    rates = {"data.mix (repeats, weight)": [[part.repeats, part.weight] for part in config.data.mix]} if config.data.mix else {}
    return {
        "run.seed": config.run.seed,
        BASE: base_fingerprint,
        "encoded data": index.digest(),
        **rates,
        _SAMPLES: samples_per_step,
        **{f"adapter.{key}": value for key, value in adapter.items()},
        **{f"objective.{key}": value for key, value in objective.items()},
        "train.optimizer": config.train.optimizer,
        "train.ema_decay": config.train.ema_decay,
    }


def require_same(folder: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError listing every field that differs between the checkpoint and this configuration."""
    stored = {_FORMER_NAMES.get(key, key): value for key, value in stored.items()}
    if differing := differing_fields(stored, now):
        lines = [f"  {key}: the run has {stored.get(key)!r}, now {now.get(key)!r}" for key in differing]
        message = "\n".join([f"{folder}: this run was started differently and cannot go on with:", *lines])
        raise UserError(f"{message}\nput the old values back, choose another run.folder, or start over with --fresh")


def differing_fields(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what two identities do not have alike."""
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def require_same_encoders(config: Config, index: Index) -> None:
    """Raises UserError when the cache was made with another VAE or text encoder, or at another precision, than configured.

    Components in a local folder are compared by content: a training machine need not hold T5. For a hub id the names and
    revisions are compared, not to download 20 GB for a question.
    """
    base, advice = Path(config.model.base), "run encode again, or put the old value back"
    if not base.is_dir():
        encoded, now = (index.base, index.revision), (config.model.base, config.model.revision)
        if encoded != now:
            message = f"{config.data.cache}: encoded with model.base, model.revision = {encoded}, now {now}; {advice}"
            raise UserError(message)
    text_encoder, _, tokenizer = index.text.fingerprint.partition("-")
    checks = {"vae": index.vae.fingerprint, "text_encoder": text_encoder, "tokenizer": tokenizer}
    for component, expected in checks.items():
        if (base / component).is_dir() and (found := fingerprint(base / component)) != expected:
            message = f"{config.data.cache}: encoded with another {component} ({expected}) than {base / component} ({found})"
            raise UserError(f"{message}; {advice}")
    precisions = {"vae_precision": index.vae.precision, "text_precision": index.text.precision}
    for setting, encoded_with in precisions.items():
        if (asked := getattr(config.encode, setting)) not in ("auto", encoded_with):
            message = f"{config.data.cache}: encoded with encode.{setting} {encoded_with}, now {asked}; {advice}"
            raise UserError(message)
