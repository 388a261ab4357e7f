"""What the command line asks of one `sample` call, beyond the configuration. No torch here."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from mochi_lora.errors import UserError

WrittenSet = Literal["trigger", "unrelated"]
_LINE_FORM = 'expected {"prompt": "...", "set": "trigger", "seed": 7}, set and seed optional'


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
    strengths: tuple[float, ...] = ()  # every video at each of them, instead of the adapters' own
    sweep: bool = False  # the adapters one by one instead of together
    grid: bool = False  # also one video of all of them as tiles

    def videos(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """(prompt, seed) of every video; `prompts` and `seeds` are the configuration's, for what was not asked."""
        wanted = self.prompts or tuple(prompts)
        fixed = self.own_seeds or (None,) * len(wanted)
        everybody = self.seeds or tuple(seeds)
        return [
            (prompt, seed) for prompt, own in zip(wanted, fixed, strict=True) for seed in (everybody if own is None else (own,))
        ]

    def columns(self, adapters: Sequence[AdapterChoice]) -> list[tuple[AdapterChoice, ...]]:
        """Which adapters act together in each version of a video; `adapters` are those asked for, or the run's own.

        Raises UserError where strengths or a sweep are asked for and there is nothing they could change.
        """
        if (self.strengths or self.sweep) and not adapters:
            raise UserError("--strengths and --sweep need an adapter: leave out --base-only (strength 0 is the base)")
        if self.sweep and len(adapters) < 2:
            raise UserError("--sweep makes a version for each adapter: give --adapter two or more")
        if self.strengths and any(choice.strength != 1 for choice in self.adapters):
            raise UserError("--strengths replaces the strength of each adapter: write --adapter PATH, without :STRENGTH")
        columns: list[tuple[AdapterChoice, ...]] = [(choice,) for choice in adapters] if self.sweep else [tuple(adapters)]
        if not self.strengths:
            return columns
        return [tuple(replace(choice, strength=s) for choice in column) for column in columns for s in self.strengths]


@dataclass(frozen=True)
class EvaluationRequest:
    """One call of `mochi-lora evaluate`."""

    quick: bool = False  # trigger prompts only, three strengths, no checkpoints, nothing tested
    adapter: Path | None = None  # instead of the run's own
    from_videos: Path | None = None  # clips made elsewhere: nothing is sampled
    output: Path | None = None
    assume_alpha_is_rank: bool = False
    command: str = "mochi-lora evaluate"  # as it was typed, for the report


@dataclass(frozen=True)
class HubTarget:
    """Where on the hub an adapter is to go."""

    repository: str  # OWNER/NAME
    private: bool = False


@dataclass(frozen=True)
class DemoRequest:
    """One call of `mochi-lora demo`."""

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None  # name of an environment variable, or a file
    open_to_anyone: bool = False
    adapters: tuple[AdapterChoice, ...] = ()
    assume_alpha_is_rank: bool = False
    started_with: tuple[str, ...] = ()  # the words that chose the configuration


@dataclass(frozen=True)
class PlanRequest:
    """One call of `mochi-lora plan`."""

    gpu: str | None = None  # by name, instead of this machine's
    memory: str | None = None  # as typed: 24GiB
    price: float | None = None  # dollars per hour
    measure: bool = False
    gpus: int | None = None  # processes of the launch; else as few as engine.parallel can mean


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompts file; None where it does not say."""

    prompt: str
    seed: int | None = None
    prompt_set: WrittenSet | None = None


def read_prompts(path: Path) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Prompts of a file, and the seed of each (None: not fixed). Raises UserError with file and line."""
    lines = read_prompt_lines(path)
    return tuple(line.prompt for line in lines), tuple(line.seed for line in lines)


def read_prompt_lines(path: Path) -> list[PromptLine]:
    """One file for `sample` and `evaluate` alike. Raises UserError with file and line.

    `.jsonl`: one object per line, `{"prompt": "...", "set": "trigger", "seed": 7}`, set (which `sample` does not ask for) and
    seed optional. Any other name: one prompt per line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: the prompts file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the prompts file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if path.suffix.lower() == ".jsonl":
        found = [_read_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        found = [PromptLine(line.strip()) for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path}: the prompts file holds no prompt; write one per line")
    return found


def _read_record(line: str, place: str) -> PromptLine:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); {_LINE_FORM}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f"{place}: no prompt; {_LINE_FORM}")
    if unknown := sorted(set(record) - {"prompt", "seed", "set"}):
        raise UserError(f"{place}: unknown key {', '.join(map(repr, unknown))}; {_LINE_FORM}")
    seed, prompt_set = record.get("seed"), record.get("set")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise UserError(f"{place}: seed {seed!r}: expected a whole number, 0 to 2^63 - 1")
    if prompt_set is not None and prompt_set not in get_args(WrittenSet):
        message = f"{place}: set {prompt_set!r}: expected 'trigger' or 'unrelated'; plain prompts come from the trigger prompts"
        raise UserError(message)
    return PromptLine(record["prompt"], seed, prompt_set)
