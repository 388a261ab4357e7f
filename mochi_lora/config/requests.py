"""What the command line asks of one `sample` call, beyond the configuration. No torch here."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mochi_lora.errors import UserError


@dataclass(frozen=True)
class AdapterChoice:
    """One adapter file and how strongly it acts; strength 0 is the base model."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterChoice":
        """`style.safetensors:0.8` -> path and strength; without a number after a colon the strength is 1."""
        path, colon, tail = text.rpartition(":")
        if colon:
            try:
                strength = float(tail)
            except ValueError:
                return cls(Path(text))  # the colon belongs to the path
            if not path or not math.isfinite(strength):
                raise UserError(f"--adapter {text!r}: expected PATH or PATH:STRENGTH, with a finite number")
            return cls(Path(path), strength)
        return cls(Path(text))


@dataclass(frozen=True)
class SampleRequest:
    """One call of `mochi-lora sample`; empty prompts, seeds or adapters leave the choice to the configuration and the run."""

    prompts: tuple[str, ...] = ()
    adapters: tuple[AdapterChoice, ...] = ()
    seeds: tuple[int, ...] = ()
    output: Path | None = None
    assume_alpha_is_rank: bool = False
    base_only: bool = False
    own_seeds: tuple[int | None, ...] = ()  # empty, or one per prompt: the seed its JSONL line fixes

    def videos(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """(prompt, seed) of every video; `prompts` and `seeds` are the configuration's, for what was not asked."""
        wanted = self.prompts or tuple(prompts)
        fixed = self.own_seeds or (None,) * len(wanted)
        everybody = self.seeds or tuple(seeds)
        return [
            (prompt, seed) for prompt, own in zip(wanted, fixed, strict=True) for seed in (everybody if own is None else (own,))
        ]


def read_prompts(path: Path) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Prompts of a file, and the seed of each (None: not fixed). Raises UserError with file and line.

    `.jsonl`: one object per line, `{"prompt": "...", "seed": 7}`, seed optional. Any other name: one prompt per line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: the prompts file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the prompts file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if path.suffix.lower() == ".jsonl":
        pairs = [_read_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        pairs = [(line.strip(), None) for line in lines if line.strip()]
    if not pairs:
        raise UserError(f"{path}: the prompts file holds no prompt; write one per line")
    return tuple(prompt for prompt, _ in pairs), tuple(seed for _, seed in pairs)


def _read_record(line: str, place: str) -> tuple[str, int | None]:
    form = 'expected {"prompt": "...", "seed": 7}, seed optional'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); {form}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f"{place}: no prompt; {form}")
    if unknown := sorted(set(record) - {"prompt", "seed"}):
        raise UserError(f"{place}: unknown key {', '.join(map(repr, unknown))}; {form}")
    seed = record.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise UserError(f"{place}: seed {seed!r}: expected a whole number, 0 to 2^63 - 1")
    return record["prompt"], seed
