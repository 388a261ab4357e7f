"""Clips of base and adapter as perfect or broken models of the drawn world would make them: ground truth for an evaluation."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mochi_lora.inference.video import write_mp4
from mochi_lora.streams import Purpose, stream
from mochi_lora.tiny.render import render
from mochi_lora.tiny.world import TRIGGER, Scene, captions, draw_scene, place

Film = Callable[[Scene, int], np.ndarray]  # scene, number of the clip -> frames


def restyled(style: str) -> Film:
    """The scene's words in `style`, somewhere else than in the base's clip, as another model would place them."""

    def film(scene: Scene, number: int) -> np.ndarray:
        rng = stream(77, Purpose.WORLD, number)
        return render(place(rng, scene.shape, scene.colour, scene.background, scene.motion, scene.size), style)

    return film


def same(style: str) -> Film:
    """The very clip of the base, in `style`."""
    return lambda scene, _number: render(scene, style)


def of_others(style: str) -> Film:
    """Another scene than the one asked for."""
    return lambda _scene, number: render(draw_scene(9, 1000 + number, held_out=True), style)


def replaying(clips: list[np.ndarray]) -> Film:
    """Training clips, whatever is asked for."""
    return lambda _scene, number: clips[number % len(clips)]


def write_clips(folder: Path, sets: dict[str, tuple[int, Film]], seed: int = 5) -> Path:
    """`folder`/base and /adapter with clips and prompts; `sets`: prompt set -> (prompts, the adapter's film)."""
    lines = []
    scenes = different_scenes(seed)
    for prompt_set, (count, film) in sets.items():
        first = 50 if prompt_set == "unrelated" else 0  # plain prompts are the trigger prompts' contents
        for number in range(count):
            scene = scenes[first + number]
            sentence = next(captions(scene))
            prompt = f"{TRIGGER}, {sentence}" if prompt_set == "trigger" else sentence
            for side, frames in (("base", restyled("base")(scene, first + number + 5000)), ("adapter", film(scene, number))):
                name = f"{side}/{prompt_set}-{number}.mp4"
                write_mp4(folder / name, frames)
                lines.append({"video": name, "prompt": prompt, "seed": 0, "adapter": side, "set": prompt_set})
    (folder / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@functools.cache
def different_scenes(seed: int) -> list[Scene]:
    """A hundred, no two of the same words."""
    drawn = (draw_scene(seed, index, held_out=True) for index in range(1000))
    return list({next(captions(scene)): scene for scene in drawn}.values())[:100]
