"""Markdown tables of the committed result lines. Of repeated cases the newest line counts; failed ones are left out."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mochi_lora.engine.plan import Plan
from mochi_lora.planning.workload import ModelSize

RESULTS = Path(__file__).parent / "results"
_T5_WIDTH = 4096  # T5 XXL's
NOT_YET = "Not measured yet.\n"
Line = dict[str, Any]


def lines(benchmark: str) -> list[Line]:
    """What was committed of a benchmark, without the cases that failed."""
    path = RESULTS / f"{benchmark}.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [line for line in found if not line.get("error")]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; no rows, no table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def table(name: str) -> str:
    """One of the tables, or that nothing was measured."""
    head, row, found = _TABLES[name]()
    return markdown(head, map(row, found)) if found else NOT_YET


def newest_steps() -> list[Line]:
    """Training steps, the newest of each case, short clips first."""
    return _newest(lines("train_step"), lambda line: (*_case(line), line["trainer"]))


_Told = tuple[Sequence[str], Callable[[Line], Sequence[str]], list[Line]]


def _newest(found: Iterable[Line], key: Callable[[Line], tuple[Any, ...]]) -> list[Line]:
    """The newest line of each key, ordered by its first part, a number, then by its words."""
    kept = {key(line): line for line in found}
    return [line for _, line in sorted(kept.items(), key=lambda item: (item[0][0], str(item[0])))]


def _case(line: Line) -> tuple[Any, ...]:
    plan = str(Plan(**line["plan"]))
    return (line["frames"], line["height"], line["width"], line["gpu"], line.get("trainer"), plan, line.get("memory_cap_gib"))


_STEP_HEAD = ("GPU", "Cap", "Clip", "Plan", "s / step", "predicted", "GiB allocated", "predicted", "reserved")


def _steps() -> _Told:
    return ("Trainer", *_STEP_HEAD), lambda line: [line["trainer"], *_step_row(line)], newest_steps()


def _step_row(line: Line) -> list[str]:
    seconds, predicted = line["step_seconds"], line.get("predicted") or {}
    return [
        *_where(line),
        "its own, bf16" if "diffusers" in (line.get("trainer"), line.get("sampler")) else str(Plan(**line["plan"])),
        f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f}, {line['steps']} steps)",
        f"{predicted['step_seconds']:.2f}" if predicted else "",
        _gib(line["allocated_gib"]),
        _gib(predicted.get("allocated_gib")),
        _gib(line["peak_gib"]),
    ]


def _where(line: Line) -> list[str]:
    cap = line.get("memory_cap_gib")
    clip = f"{line['frames']} at {line['height']}x{line['width']}" if line["frames"] else ""
    return [line["gpu"], f"{cap:.0f} GiB" if cap else "none", clip]


def _gib(amount: float | None) -> str:
    return "" if amount is None else f"{amount:.1f}"


def _samples() -> _Told:
    """Of single steps; whole videos have lines of another form."""
    single = [line for line in lines("sample_step") if "tokens_per_second" in line]
    found = _newest(single, lambda line: (*_case(line), line["sampler"], line["adapter"]))
    head = ("Sampler", *_STEP_HEAD, "Adapter")
    return head, lambda line: [line["sampler"], *_step_row(line), line["adapter"]], found


def _videos() -> _Told:
    whole = [line for line in lines("sample_step") if "part_seconds" in line]
    found = _newest(whole, lambda line: (*_case(line), line["adapter"], line["steps"]))
    head = (
        "GPU",
        "Cap",
        "Clip",
        "Plan",
        "Adapter",
        "T5 s",
        "Denoising s",
        "s / step",
        "Decoding s",
        "Writing s",
        "GiB reserved",
    )
    return head, _video_row, found


def _video_row(line: Line) -> list[str]:
    parts = line["part_seconds"]
    return [
        *_where(line),
        str(Plan(**line["plan"])),
        line["adapter"],
        f"{parts['text']:.2f}",
        f"{parts['denoising']:.1f} ({line['steps']} steps)",
        f"{line['step_seconds']['last']:.2f}",
        f"{parts['decoding']:.1f}",
        f"{parts['writing']:.1f}",
        _gib(line["peak_gib"]),
    ]


def _vae() -> _Told:
    """Of the full-size VAE: one clip that lies on the device."""
    full = [line for line in lines("encode") if line["what"] in ("encode", "decode") and not line["channels"]]
    parts = ("height", "width", "what", "gpu", "implementation", "plan", "memory_cap_gib")

    def key(line: Line) -> tuple[Any, ...]:
        return (line["frames"], *(str(line[part]) for part in parts))

    exact = {key(line): line["error_from_fp32"] for line in full if line["error_from_fp32"] is not None}
    # --exact is run for the error, on one clip: its seconds are no figure.
    timed = _newest([line for line in full if line["error_from_fp32"] is None], key)

    def row(line: Line) -> list[str]:
        errors = (line["difference"], exact.get(key(line)))
        return [line["what"], f"{line['implementation']}, {_with(line['plan'])}", *_clip_row(line), *map(_off, errors)]

    return ("Task", "Implementation", *_CLIP_HEAD, "off the other", "off float32"), row, timed


_CLIP_HEAD = ("GPU", "Cap", "Clip", "s / clip", "GiB allocated", "reserved")


def _clip_row(line: Line) -> list[str]:
    seconds = line["clip_seconds"]
    told = f"{seconds['median']:.3g}"
    if seconds["min"] < seconds["max"]:
        told += f" ({seconds['min']:.3g} to {seconds['max']:.3g})"
    return [*_where(line), told, _gib(line["allocated_gib"]), _gib(line["peak_gib"])]


def _with(plan: dict[str, Any]) -> str:
    """The precision, and what differs from a usual call."""
    return f"{plan['precision']}{', cudnn.benchmark' if plan['cudnn_benchmark'] else ''}"


def _off(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _encoding() -> _Told:
    """Films from the disk into the cache, and captions through T5, full size."""
    full = [line for line in lines("encode") if line["what"] == "folder" and not line["channels"]]
    full += [line for line in lines("encode") if line["what"] == "text" and line["text_width"] == _T5_WIDTH]
    parts = ("height", "width", "what", "film", "gpu", "plan", "memory_cap_gib")
    found = _newest(full, lambda line: (line["frames"] or 0, *(str(line.get(part)) for part in parts)))
    return ("Work", *_CLIP_HEAD, "a kernel runs"), _encoding_row, found


def _encoding_row(line: Line) -> list[str]:
    plan, busy = line["plan"], line["gpu_busy_share"]
    text = line["what"] == "text"
    films = "" if text else f"{line['clips']} films of {line['film']}, {plan['read_ahead']} read ahead"
    return [
        f"captions, {plan['text_batch']} at once" if text else films,
        *_clip_row(line),
        "" if busy is None else f"{busy:.0%}",
    ]


def _scale() -> _Told:
    """Full depth alone: fewer layers are for trying it out."""
    full = [line for line in lines("scale") if line["layers"] == ModelSize.of({}).layers]
    found = _newest(full, lambda line: (*_case(line), line["world_size"], line["mode"]))
    head = ("GPUs", "Shared", "Cap", "Clip", "Plan", "s / step", "Training", "of `data`", "s / guided step", "Sampling")
    return (*head, "GiB at rest", "of one GPU's"), _scale_row, found


def _scale_row(line: Line) -> list[str]:
    def figure(name: str, form: str) -> str:
        return f"{line[name]:{form}}" if line.get(name) else ""

    def times(name: str) -> str:
        return figure(name, ".2f") and f"{figure(name, '.2f')}x"

    gpu, cap, clip = _where(line)
    return [
        f"{line['world_size']} x {gpu}",
        line["mode"],
        cap,
        clip,
        str(Plan(**line["plan"])),
        f"{line['step_seconds']['median']:.2f}",
        times("speed_up"),
        figure("speed_against_data", ".3f"),
        f"{line['guided_step_seconds']:.2f}",
        times("sampling_speed_up"),
        figure("static_gib", ".1f"),
        figure("static_share", ".1%"),
    ]


def _errors() -> _Told:
    kept = {(_subject(line), line["gpu"], line["gate"], str(Plan(**line["plan"]))): line for line in lines("plan_errors")}
    head = ("Model", "GPU", "Gates", "Plan", "Velocity", "Adapter gradient", "Worst tensor's gradient")
    order = sorted(kept, key=lambda case: case[:3])  # what a later session adds stands with its own kind
    return head, _error_row, [kept[case] for case in order]


def _subject(line: Line) -> str:
    """The first lines name no model: there was one."""
    return str(line.get("model", "full width"))


def _error_row(line: Line) -> list[str]:
    figures = [f"{line[name]:.1e}" for name in ("velocity_error", "gradient_error", "worst_gradient_error")]
    return [_subject(line), line["gpu"], str(line["gate"]), str(Plan(**line["plan"])), *figures]


def _step_cache() -> _Told:
    kept = {(line["steps"], line["threshold"], line["prompts"]): line for line in lines("step_cache")}
    found = sorted(kept.values(), key=lambda line: (line["steps"] != line["reference_steps"], line["spared"]))
    head = ("Steps", "`step_cache`", "Passes spared", "Latents off", "Frames, PSNR (worst clip)", "Colour", "Shape", "Motion")
    return head, _step_cache_row, found


def _step_cache_row(line: Line) -> list[str]:
    psnr = "equal" if line["psnr"] is None else f"{line['psnr']:.0f} dB ({line['worst_psnr']:.0f})"
    marks = [f"{line[word]:.0%}" for word in ("colour", "shape", "motion")]
    cache = f"{line['threshold']:g}" if line["threshold"] else "0, exact"
    return [str(line["steps"]), cache, f"{line['spared']:.0%}", f"{line['latent_error']:.1%}", psnr, *marks]


def _learning() -> _Told:
    kept = {(line["precision"], line["against"], line["steps"]): line for line in lines("learn_precision")}
    head = ("Base", "Compared with", "Steps", "Held-out clips", "Loss without adapter", "Gain of the plain run")
    return (*head, "Worse by (95 % interval)", "of the gain", "Margin"), _learning_row, list(kept.values())


def _learning_row(line: Line) -> list[str]:
    interval = f"{line['difference']:.4f} ({line['difference_low']:.4f} to {line['difference_high']:.4f})"
    losses = [f"{line[name]:.3f}" for name in ("loss_without_adapter", "gain")]
    counts = [str(line[name]) for name in ("steps", "held_out_clips")]
    return [
        line["precision"],
        line["against"],
        *counts,
        *losses,
        interval,
        f"{line['difference'] / line['gain']:.2%}",
        f"{line['margin']:.0%}",
    ]


_TABLES: dict[str, Callable[[], _Told]] = {
    "train_step": _steps,
    "sample_step": _samples,
    "whole_video": _videos,
    "vae": _vae,
    "encoding": _encoding,
    "scale": _scale,
    "plan_errors": _errors,
    "learn_precision": _learning,
    "step_cache": _step_cache,
}
