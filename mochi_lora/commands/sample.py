"""`mochi-lora sample`: base plus adapters to videos, a contact sheet, and a grid where one is asked for."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mochi_lora.config.requests import AdapterChoice, SampleRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.errors import UserError
from mochi_lora.inference.playback import read_video
from mochi_lora.inference.shots import Shot, short_names
from mochi_lora.inference.tiles import GridRow, write_grids
from mochi_lora.inference.video import glimpse, video_name, write_contact_sheet
from mochi_lora.parallel.mesh import Ranks
from mochi_lora.runs.folder import final_adapter
from mochi_lora.runs.processes import agreed, join_launch, out_of_memory_named
from mochi_lora.runs.videos import make_videos


def run(config: Config, request: SampleRequest) -> list[Path]:
    """Make every video asked for that is not there yet; returns their paths. Raises UserError for what a person can mend."""
    jobs = request.videos(config.sample.prompts, config.sample.seeds)
    if not jobs:
        message = "no prompt: give --prompt, --prompts FILE, or sample.prompts in the configuration"
        raise UserError(message)
    with join_launch(config) as ranks, out_of_memory_named():
        return _made(config, request, jobs, ranks)


def _made(config: Config, request: SampleRequest, jobs: Sequence[tuple[str, int]], ranks: Ranks) -> list[Path]:
    columns = request.columns(_adapters(config, request))
    labels = label_columns(columns)
    folder = request.output or config.run.folder / "samples" / agreed(time.strftime("sample-%Y%m%d-%H%M%S"))
    shots = _shots(jobs, columns, labels)
    paths = make_videos(config, shots, folder, assume_alpha_is_rank=request.assume_alpha_is_rank, ranks=ranks)
    if ranks.rank:
        return paths
    titles = [f"{prompt} (seed {seed})" for prompt, seed in jobs]
    _write_sheet(folder / "sheet.png", titles, labels, paths)
    for path in paths:
        console.print(f"video    {path}", markup=False)
    console.print(f"sheet    {folder / 'sheet.png'}", markup=False)
    if request.grid:
        width = len(columns)
        rows = [GridRow(title, tuple(paths[at * width : (at + 1) * width])) for at, title in enumerate(titles)]
        for grid in write_grids(folder, labels, rows):
            console.print(f"grid     {grid}", markup=False)
    return paths


def label_columns(columns: Sequence[Sequence[AdapterChoice]]) -> list[str]:
    """A name for each column, all different: file names and strengths, and the folder where two files are called alike."""
    names = short_names(choice.path for column in columns for choice in column)
    labels = [" + ".join(f"{names[item.path]} {item.strength:g}" for item in column) or "base" for column in columns]
    repeated = Counter(labels)
    return [label if repeated[label] == 1 else f"{label} ({number})" for number, label in enumerate(labels, 1)]


def _shots(jobs: Sequence[tuple[str, int]], columns: Sequence[tuple[AdapterChoice, ...]], labels: Sequence[str]) -> list[Shot]:
    """Row by row: every column's version of a prompt and seed."""
    shots = []
    for number, (prompt, seed) in enumerate(jobs):
        name = video_name(number, prompt, seed)
        for column, label in zip(columns, labels, strict=True):
            ending = "" if len(columns) == 1 else "-" + re.sub(r"[^\w.-]+", "-", label).strip("-")
            shots.append(Shot(name.replace(".mp4", f"{ending}.mp4"), prompt, seed, column))
    return shots


def _write_sheet(path: Path, titles: Sequence[str], labels: Sequence[str], videos: Sequence[Path]) -> None:
    """Read back from the files: some may have been there already."""
    captions = titles if len(labels) == 1 else [f"{title}, {label}" for title in titles for label in labels]
    write_contact_sheet(
        path, [(caption, glimpse(read_video(video).frames)) for caption, video in zip(captions, videos, strict=True)]
    )


def _adapters(config: Config, request: SampleRequest) -> list[AdapterChoice]:
    """Those asked for, else the run's own at sample.strength."""
    if request.base_only:
        return []
    if request.adapters:
        return list(request.adapters)
    own = final_adapter(config)
    if not own.exists():
        message = f"{own}: this run has no finished adapter yet; train first, or give --adapter PATH or --base-only"
        raise UserError(message)
    return [AdapterChoice(own, config.sample.strength)]
