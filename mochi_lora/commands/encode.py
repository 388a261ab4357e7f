"""`mochi-lora encode`: clips and captions to the cache, prompts included, and a report of what became of each."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache as once

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.markup import escape

from mochi_lora.commands.encode_plan import print_draws, tell_added
from mochi_lora.commands.encode_split import tell_split, tell_unnamed_sources
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.data.ahead import threads_to_read
from mochi_lora.data.cache import Cache, EncoderIdentity, text_key
from mochi_lora.data.encode import EncodedClip, LatentEncoder, encode_clips
from mochi_lora.data.index import Index, IndexEntry, index_path, write_index
from mochi_lora.data.mix import Part, list_part, parts_of, where_of
from mochi_lora.data.sources import ClipSource, Rejection
from mochi_lora.data.split import validation_sources, video_of
from mochi_lora.errors import UserError
from mochi_lora.files import remove_abandoned, write_text
from mochi_lora.model.base import fingerprint, locate
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.text import TextEncoder, Tokenised, load_tokenizer, refuse_foreign, tokenise
from mochi_lora.model.vae import MochiVae
from mochi_lora.runs.called import Called
from mochi_lora.runs.processes import LONG_WAIT_MINUTES, agreed, decided, open_processes, out_of_memory_named, processes_here
from mochi_lora.spec import Bucket

Kept = tuple[int, EncodedClip]  # with the number of its part
_ABANDONED_SECONDS = 3600  # other processes may be writing into a shared cache; no entry takes them an hour


def run(config: Config, *, called: Called = Called()) -> None:  # noqa: B008 - frozen
    """Encode everything the configuration names. Run again to continue; several processes share the work."""
    with open_processes(config.engine.device, LONG_WAIT_MINUTES) as processes, out_of_memory_named():
        _encode(config, processes, called)


def _encode(config: Config, processes: Accelerator, called: Called) -> None:
    # A clip that comes while processes start is on some lists only. Each makes one all the same: it may unpack a data set.
    listed = agreed([(part, *list_part(part, config.data)) for part in parts_of(config.data)])
    cache = Cache(config.data.cache)
    if processes.is_main_process:
        remove_abandoned(cache.root, older_than_seconds=_ABANDONED_SECONDS)
    sources = [(part, found) for part, found, _ in listed]
    kept, refused, vae, stats = _encode_latents(config, processes, sources, cache)
    captions = sorted({clip.source.caption.strip() for _, clip in kept})
    tokenised, text = _encode_text(config, processes, captions, cache)
    mute = [clip for _, clip in kept if tokenised[clip.source.caption.strip()].unknown_share == 1]
    refused += [
        Rejection(clip.source.name, "caption: every token is unknown to T5 (it knows English); translate it") for clip in mute
    ]
    kept = [(part, clip) for part, clip in kept if clip not in mute]
    if processes.is_main_process:
        tell_added(parts_of(config.data), [clip.bucket for _, clip in kept], [part for part, _ in kept])
        _report(config, kept, [*(item for _, _, rejected in listed for item in rejected), *refused], tokenised)
        if kept:
            videos = video_of((clip.source_sha256, clip.source.video) for _, clip in kept)
            of_clips = [videos[clip.source_sha256] for _, clip in kept]
            index = _index(config, kept, of_clips, vae, text, stats)
            path = write_index(config.data, index)
            tell_split(of_clips, config.data.validation_fraction)
            tell_unnamed_sources([clip.source for _, clip in kept], config.data.validation_fraction)
            _tell_draws(config, index)
            console.print(f"index    {path}", markup=False)
            called.say_next("train", "(or accelerate launch train.py, on several GPUs)")
    if not kept:
        message = f"{where_of(config.data)}: no clip could be used; the table above says why for each"
        raise UserError(message)


def _encode_latents(
    config: Config, processes: Accelerator, sources: Sequence[tuple[Part, list[ClipSource]]], cache: Cache
) -> tuple[list[Kept], list[Rejection], EncoderIdentity, LatentStats]:
    """This launch's clips, part by part in the order of `sources`; the VAE is loaded only where something is missing."""
    folder = locate(config.model.base, config.model.revision, "vae")
    precision = config.encode.vae_precision
    if precision == "auto":
        precision = "bf16" if processes.device.type == "cuda" else "fp32"
    identity = EncoderIdentity(fingerprint(folder), precision)

    @once
    def encoder() -> LatentEncoder:
        return MochiVae.load(folder, device=processes.device, precision=precision).encode

    read_ahead = threads_to_read(config.encode.read_ahead, processes_here())
    pin = processes.device.type == "cuda"
    found: list[tuple[int, int, EncodedClip | Rejection]] = []
    with progress_bar() as bar:
        shares = [range(processes.process_index, len(clips), processes.num_processes) for _, clips in sources]
        task = bar.add_task("latents", total=sum(map(len, shares)))
        for (part, clips), mine in zip(sources, shares, strict=True):
            chosen = [clips[place] for place in mine]
            outcomes = encode_clips(chosen, part.shapes, cache, identity, encoder, read_ahead=read_ahead, pin=pin)
            for place, outcome in zip(mine, outcomes, strict=True):
                found.append((part.number, place, outcome))
                bar.update(task, advance=1)
    encoder.cache_clear()
    _free(processes.device)
    everyone = sorted(gather_object(found), key=lambda entry: entry[:2])
    kept = [(part, outcome) for part, _, outcome in everyone if isinstance(outcome, EncodedClip)]
    refused = [outcome for _, _, outcome in everyone if isinstance(outcome, Rejection)]
    return kept, refused, identity, MochiVae.stats_of(folder)


def _encode_text(
    config: Config, processes: Accelerator, captions: list[str], cache: Cache
) -> tuple[dict[str, Tokenised], EncoderIdentity]:
    """Embed captions and the prompts of `sample`; returns what the tokenizer said of each caption."""
    base = locate(config.model.base, config.model.revision, "text_encoder").parent
    tokenizer_folder = locate(config.model.base, config.model.revision, "tokenizer")
    made_by = f"{fingerprint(base / 'text_encoder')}-{fingerprint(tokenizer_folder)}"
    identity = EncoderIdentity(made_by, config.encode.text_precision)
    prompts = sorted({prompt.strip() for prompt in (*config.sample.prompts, config.sample.negative_prompt)})
    tokenizer = load_tokenizer(tokenizer_folder)
    refuse_foreign(prompts, tokenise(tokenizer, prompts))
    wanted = sorted({*captions, *prompts})
    # One process looks: another would find what its peers have written since, and take every n-th of a shorter list.
    missing = decided(lambda: [text for text in wanted if not cache.holds("text", text_key(text, identity))])
    mine = missing[processes.process_index :: processes.num_processes]
    if mine:
        encoder = TextEncoder.load(base, device=processes.device, precision=config.encode.text_precision)
        with progress_bar() as bar:
            task = bar.add_task("captions", total=len(mine))
            for start in range(0, len(mine), config.encode.text_batch):
                batch = mine[start : start + config.encode.text_batch]
                for text, embedding in zip(batch, encoder.embed(batch), strict=True):
                    cache.write_text(text_key(text, identity), embedding, {"caption": text})
                bar.update(task, advance=len(batch))
        del encoder
    _free(processes.device)
    processes.wait_for_everyone()
    return dict(zip(captions, tokenise(tokenizer, captions), strict=True)), identity


def _index(
    config: Config, kept: list[Kept], videos: list[str], vae: EncoderIdentity, text: EncoderIdentity, stats: LatentStats
) -> Index:
    """`videos` names the video of each clip kept."""
    held_out = validation_sources(videos, config.data.validation_fraction)
    entries = tuple(
        IndexEntry(
            clip=clip.source.name,
            source_sha256=clip.source_sha256,
            bucket=str(clip.bucket),
            latents=clip.key,
            text=text_key(clip.source.caption, text),
            caption=clip.source.caption.strip(),
            split="validation" if video in held_out else "train",
            part=part,
        )
        for (part, clip), video in zip(kept, videos, strict=True)
    )
    return Index(config.model.base, config.model.revision, vae, text, stats.mean, stats.std, stats.scale, entries)


def _tell_draws(config: Config, index: Index) -> None:
    """What of the data set an epoch of training draws, where that is not every clip once."""
    train = index.of("train")
    if config.data.mix:
        buckets = [Bucket.parse(entry.bucket) for entry in train]
        print_draws(parts_of(config.data), buckets, [entry.part for entry in train])


def _report(config: Config, kept: list[Kept], rejections: list[Rejection], tokenised: dict[str, Tokenised]) -> None:
    """The table people see, and the same with every clip as a JSONL file."""
    clips = [clip for _, clip in kept]
    lines = [
        {
            "clip": clip.source.name,
            "status": clip.status,
            "bucket": str(clip.bucket),
            "unused_seconds": round(clip.unused_seconds, 3),
        }
        for clip in clips
    ] + [{"clip": rejection.name, "status": "rejected", "reason": rejection.reason} for rejection in rejections]
    path = index_path(config.data).with_suffix(".report.jsonl")
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts = Counter(line["status"] for line in lines)
    shapes = Counter(str(clip.bucket) for clip in clips)
    trimmed = sum(clip.unused_seconds for clip in clips if clip.status == "trimmed")
    rows = [
        (
            "kept",
            counts["kept"] + counts["trimmed"],
            ", ".join(f"{count} x {shape}" for shape, count in sorted(shapes.items())),
        ),
        ("of these trimmed", counts["trimmed"], f"{trimmed:.1f} s at their ends are not used"),
        ("of these already cached", sum(clip.was_cached for clip in clips), ""),
        ("rejected", counts["rejected"], ""),
    ]
    print_table("clips", ("", "count", ""), rows)
    if rejections:
        print_table("rejected", ("clip", "reason"), [(item.name, item.reason) for item in rejections])
    _warn("captions cut at 256 tokens", clips, lambda item: item.truncated, tokenised)
    limit = config.encode.unknown_token_limit
    _warn(f"captions with more than {limit:.0%} unknown tokens", clips, lambda item: item.unknown_share > limit, tokenised)
    console.print(f"report   {path}", markup=False)


def _warn(title: str, clips: list[EncodedClip], applies: Callable[[Tokenised], bool], tokenised: dict[str, Tokenised]) -> None:
    named = [clip.source.name for clip in clips if applies(tokenised[clip.source.caption.strip()])]
    if named:
        console.print(f"[yellow]{len(named)} {title}:[/yellow] {escape(', '.join(named))}")


def _free(device: torch.device) -> None:
    """Give the last encoder's memory back: one encoder at a time."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
