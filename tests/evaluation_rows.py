"""Measured clips made up: a base, an adapter, noise per prompt and per seed."""

import numpy as np

from mochi_lora.evaluation.paired import Design
from mochi_lora.evaluation.results import Row

STYLE, ALIGN, QUALITY = "style.descriptor", "align.clip", "quality.subject_consistency"
LEVELS = {STYLE: 0.3, ALIGN: 0.25, QUALITY: 0.9}


def design(**changes) -> Design:
    fixed = {
        "primaries": {"style": STYLE, "alignment": ALIGN, "quality": QUALITY},
        "margins": {ALIGN: 0.01, QUALITY: 0.02},
        "seed": 3,
        "resamples": 1000,
    }
    return Design(**fixed | changes)


def clips(adapter: str, levels: dict[str, float], *, noise: float = 0.003, **where) -> list[Row]:
    """Clips of one adapter. `where`: prompt_set, prompts, seeds, strength. What a prompt or a seed adds is the same for
    every adapter, so that differences carry only the adapter's own noise."""
    prompt_set, prompts, seeds = where.get("prompt_set", "trigger"), where.get("prompts", 12), where.get("seeds", 2)
    strength = where.get("strength", 0.0 if adapter == "base" else 1.0)
    shared = np.random.default_rng(len(prompt_set)).normal(0, 0.05, (prompts, seeds))
    own = np.random.default_rng([ord(letter) for letter in f"{adapter} {prompt_set} {strength}"]).normal
    rows = []
    for prompt in range(prompts):
        for seed in range(seeds):
            values = {name: level + float(shared[prompt, seed] + own(0, noise)) for name, level in levels.items()}
            name = f"{adapter}-{prompt_set}-{strength}-{prompt}-{seed}.mp4"
            rows.append(Row(name, prompt_set, f"{prompt_set} prompt {prompt}", seed, adapter, strength, values))
    return rows


def shifted(**by: float) -> dict[str, float]:
    """LEVELS with the named axes changed: style, alignment, quality."""
    names = {"style": STYLE, "alignment": ALIGN, "quality": QUALITY}
    return LEVELS | {names[axis]: LEVELS[names[axis]] + change for axis, change in by.items()}
