"""Seconds that splitting and filtering a film take on a CPU: one JSON line per run of this script.

    python benchmarks/prepare.py FILM [--repeats 5] [--cores 2]

Probe, survey, split and filter, with the default settings and nothing kept from before. `times_real_time_median` and
`frames_per_second_median` are of the median run, and so is `cpu_seconds`, which counts all threads. In lines that have
`times_real_time` instead, that and `cpu_seconds` are of the best run.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mochi_lora.config.curation import FilterConfig, SplitConfig
from mochi_lora.curation.filters import filter_clips
from mochi_lora.curation.split import split_source
from mochi_lora.curation.survey import survey_source
from mochi_lora.data.probe import probe

RESULTS = Path(__file__).parent / "results" / "prepare.jsonl"


def main() -> None:
    """Time the film and append the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cores)
    line = measure(arguments.film, arguments.repeats) | {"cores": len(cores)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def measure(film: Path, repeats: int) -> dict[str, Any]:
    """One line of the results."""
    runs: list[tuple[float, float]] = []
    clips, kept = 0, 0
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        split = SplitConfig()
        info = probe(film)
        survey = survey_source(info, split, lambda _: None)
        found, _ = split_source(film, survey, split, film.parent)
        judged = filter_clips(found, FilterConfig()).clips
        runs.append((time.perf_counter() - wall, time.process_time() - cpu))
        clips, kept = len(judged), sum(clip.refused is None for clip in judged)
    runs.sort()
    seconds, cpu_seconds = runs[len(runs) // 2]
    return {
        "benchmark": "prepare",
        "gpu": "none (CPU)",
        "film": film.name,
        "width": info.width,
        "height": info.height,
        "frames": len(survey.times),
        "film_seconds": round(survey.duration, 3),
        "prepare_seconds": {"min": runs[0][0], "median": seconds, "max": runs[-1][0]},
        "cpu_seconds": cpu_seconds,
        "times_real_time_median": survey.duration / seconds,
        "frames_per_second_median": len(survey.times) / seconds,
        "clips": clips,
        "kept": kept,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("av", "opencv-python-headless", "scenedetect-headless")},
    }


if __name__ == "__main__":
    main()
