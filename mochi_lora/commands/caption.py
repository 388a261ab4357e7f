"""`mochi-lora caption`: a caption for every clip that has none, and a sheet of them for a person to correct.

Run again to continue, or to take corrections over. What counts, in this order: a corrected line of the sheet; the caption
that is there, unless `caption.overwrite`; the model's answer.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from mochi_lora.config.curation import CaptionConfig
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table, progress_bar
from mochi_lora.curation.caption_rules import Rules
from mochi_lora.curation.caption_sheet import SHEET, Key, Line, append_line, read_sheet, text_digest, write_sheet
from mochi_lora.curation.caption_table import key_of, list_captionable, store_captions
from mochi_lora.curation.caption_text import INSTRUCTION, INSTRUCTION_FOR_PICTURES
from mochi_lora.curation.captioner import Answer, Captioner, Look, load_captioner, look_at
from mochi_lora.curation.manifest import KEPT, name_in_table
from mochi_lora.data.sources import ClipSource, Rejection
from mochi_lora.engine.plan import resolve_device
from mochi_lora.errors import UserError
from mochi_lora.files import digest_of, only_one
from mochi_lora.measures.pretrained import Pretrained, fetch
from mochi_lora.spec import TEXT_TOKENS

# What reading a damaged file may end in besides `ClipError`, itself a ValueError; memory and the disk are everybody's.
_CLIP_FAILURES = (ValueError, OSError, IndexError, RuntimeError)
_INSTEAD = "write the captions yourself and set caption.model: null"


@dataclass
class _Work:
    """The state of one run."""

    settings: CaptionConfig
    target: Path  # folder or table whose clips are captioned
    sheet_path: Path
    rules: Rules
    clips: list[ClipSource]
    unreadable: list[Rejection]  # clips whose captions cannot be read
    sheet: dict[Key, Line]
    answers: int = 0
    shortened: list[str] = field(default_factory=list)
    corrected: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # clip, why it could not be looked at


def run(config: Config, *, clips: Path | None = None) -> int:
    """Caption `clips`, or those of `caption.clips`, by default the table that `prepare` wrote; returns how many have none now.

    Without a model the sheet gets a line to fill in for each of those. Raises UserError if a model captioned none, and, with
    all others seen to, if one has a caption that cannot be read.
    """
    settings, folder = config.caption, config.prepare.folder
    target = clips or settings.clips or folder / KEPT
    if target == folder / KEPT and not target.is_file():
        raise UserError(f"{target}: not there yet; run mochi-lora prepare first, or name a folder or table in caption.clips")
    with only_one(folder / SHEET, "captioning"):
        (found_clips, unreadable), sheet = list_captionable(target), read_sheet(folder / SHEET)
        if not found_clips and not unreadable:
            raise UserError(f"caption.clips: no clips in {target}; expected a folder of clips or a .jsonl table of them")
        work = _Work(settings, target, folder / SHEET, Rules.of(config), found_clips, unreadable, sheet)
        if settings.model is not None:
            found = fetch(settings.model, "captions (caption.model)", instead=_INSTEAD)
            _ask(work, found, resolve_device(config.engine.device))
        _settle(work)
    captionable, _ = list_captionable(target)
    _report(work, captionable)
    return sum(not clip.caption for clip in captionable)


def _ask(work: _Work, found: Pretrained, device: str) -> None:
    """Append a line for every clip that is due. The model is loaded only if one is."""
    settings = work.settings
    asked = _digest_of_question(settings, found)
    due = [clip for clip in work.clips if _is_due(clip, work.sheet.get(key_of(clip)), asked, overwrite=settings.overwrite)]
    if not due:
        return
    if [clip for clip in due if work.sheet.pop(key_of(clip), None)]:  # old lines go first: a clip never has two
        write_sheet(work.sheet_path, work.sheet)
    captioner = load_captioner(found, device, quantisation=settings.quantisation, answer_tokens=settings.answer_tokens)
    with progress_bar() as bar:
        task = bar.add_task("captions", total=len(due))
        for seen, failed in _looks(due, settings):
            work.failed += failed
            answers = _answers(captioner, [look for _, look in seen], settings.instruction) if seen else []
            for (clip, _), answer in zip(seen, answers, strict=True):
                line = _line(work, clip, answer, captioner.name, asked)
                append_line(work.sheet_path, line)
                work.sheet[key_of(clip)] = line
            bar.update(task, advance=len(seen) + len(failed))


def _digest_of_question(settings: CaptionConfig, found: Pretrained) -> str:
    """Same digest, same answer: who is asked, what it sees, what it is asked."""
    request = settings.instruction or [INSTRUCTION, INSTRUCTION_FOR_PICTURES]
    view = [settings.frames, settings.longest_side, settings.answer_tokens, settings.quantisation]
    return digest_of([found.label, request, view])[:12]


def _is_due(clip: ClipSource, line: Line | None, asked: str, *, overwrite: bool) -> bool:
    if line is None or line.waiting:
        return overwrite or not clip.caption
    if line.edited or line.corrected or line.asked == asked:
        return False
    return overwrite or (line.refused is not None and not clip.caption)  # another question may have a better answer


_Seen = tuple[list[tuple[ClipSource, Look]], list[tuple[str, str]]]


def _looks(due: Sequence[ClipSource], settings: CaptionConfig) -> Iterator[_Seen]:
    """(clips with what is seen of them, clips that cannot be read with the reason), batch by batch, read one batch ahead."""
    parts = [due[start : start + settings.batch] for start in range(0, len(due), settings.batch)]
    read = partial(_read, settings=settings)
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead: Future[_Seen] = reader.submit(read, parts[0])
        for following in parts[1:]:
            ready, ahead = ahead, reader.submit(read, following)
            yield ready.result()
        yield ahead.result()


def _read(part: Sequence[ClipSource], settings: CaptionConfig) -> _Seen:
    seen, failed = [], []
    for clip in part:
        try:
            seen.append((clip, look_at(clip, settings.frames, settings.longest_side)))
        except _CLIP_FAILURES as error:
            failed.append((clip.name, str(error).removeprefix(f"{clip.name}: ").removeprefix(f"{clip.path}: ")))
    return seen, failed


def _answers(captioner: Captioner, looks: Sequence[Look], instruction: str | None) -> list[Answer]:
    try:
        return captioner.ask(looks, instruction)
    except torch.OutOfMemoryError as error:
        message = (
            f"the GPU's memory is full ({str(error).splitlines()[0]}). What makes it fit, in this order: a smaller "
            "caption.batch, caption.quantisation 4bit, a smaller caption.longest_side, fewer caption.frames, a smaller model. "
            "The answers so far are in the sheet; run the command again"
        )
        raise UserError(message) from error


def _line(work: _Work, clip: ClipSource, answer: Answer, model: str, asked: str) -> Line:
    written = work.rules.caption(answer)
    work.answers += 1
    work.shortened += [clip.name] * written.shortened
    return Line(
        file_name=name_in_table(clip.path, work.sheet_path.parent),
        start=clip.start,
        end=clip.end,
        text=written.text,
        raw=answer.text,
        model=model,
        tokens=written.tokens,
        finished=answer.finished,
        refused=written.refused,
        asked=asked,
        written=text_digest(written.text),
    )


def _settle(work: _Work) -> None:
    """Bring captions and sheet together: captions first, so that a kill in between leaves a correction a correction."""
    captions: dict[Key, str] = {}
    sheet = dict(work.sheet)
    for clip in work.clips:
        key = key_of(clip)
        line = sheet.get(key)
        if line is None:
            if work.settings.model is None and not clip.caption:
                sheet[key] = _to_fill_in(clip, work.sheet_path.parent)
            continue
        if line.corrected:
            work.corrected += 1
            captions[key] = line.text.strip()
            sheet[key] = line.taken_over(len(work.rules.tokens(line.text).ids))
            continue
        ours = work.settings.overwrite and not (line.edited or line.waiting)
        if ours:  # the same answer under today's trigger and rules
            sheet[key] = line = _rewritten(line, work.rules)
        if line.text and (ours or not clip.caption):
            captions[key] = line.text
    store_captions(work.target, captions)
    if sheet != work.sheet:
        write_sheet(work.sheet_path, sheet)
        work.sheet = sheet


def _to_fill_in(clip: ClipSource, folder: Path) -> Line:
    name = name_in_table(clip.path, folder)
    return Line(file_name=name, start=clip.start, end=clip.end, text="", written=text_digest(""))


def _rewritten(line: Line, rules: Rules) -> Line:
    new = rules.caption(Answer(line.raw, line.finished))
    return replace(line, text=new.text, tokens=new.tokens, refused=new.refused, written=text_digest(new.text))


def _report(work: _Work, clips: Sequence[ClipSource]) -> None:
    """What became of the clips, which captions need a person, and where they are."""
    lines = {key: line for clip in clips if (line := work.sheet.get(key := key_of(clip)))}
    captioned = [clip for clip in clips if clip.caption]
    count = len(clips) + len(work.unreadable)
    own = [clip for clip in captioned if key_of(clip) not in lines or lines[key_of(clip)].text.strip() != clip.caption]
    trigger = work.rules.trigger
    uncalled = [clip.name for clip in captioned if trigger.words and not trigger.called_in(clip.caption)]
    long = [clip.name for clip in captioned if work.rules.tokens(clip.caption).truncated]
    answered = f"in captions.jsonl: {work.answers} written now, {work.corrected} corrected by hand and taken over now"
    rows = [
        ("with a caption", len(captioned), f"of {count} clips"),
        ("of these from the sheet", len(captioned) - len(own), answered),
        ("of these kept as they were", len(own), ""),
        (f"shortened to {TEXT_TOKENS} tokens", len(work.shortened), ", ".join(work.shortened)),
        (f"longer than {TEXT_TOKENS} tokens", len(long), ", ".join(long)),
        ("without the trigger", len(uncalled), ", ".join(uncalled)),
    ]
    print_table("captions", ("", "count", ""), [row for row in rows if row[1] or row is rows[0]])
    unusable = [(clip.name, lines[key].refused) for clip in clips if (key := key_of(clip)) in lines and lines[key].refused]
    refused = [*work.failed, *unusable, *((item.name, item.reason) for item in work.unreadable)]
    if refused:
        print_table("no caption", ("clip", "reason"), refused)
    if work.sheet_path.is_file():
        console.print(f"sheet    {work.sheet_path}   (correct the column text, then run this again)", markup=False)
    if work.settings.model is None and len(captioned) < len(clips):
        waiting = len(clips) - len(captioned)
        told = "1 clip waits for its caption" if waiting == 1 else f"{waiting} clips wait for their captions"
        console.print(f"by hand  {told} in the sheet; mochi-lora sheet shows what is in them", markup=False)
    elif not captioned:
        told = "the table above says why for each" if refused else "the sheet has none either"
        raise UserError(f"{work.target}: no clip has a caption; {told}")
    console.print(f"captions {work.target}", markup=False)
    if work.unreadable:
        has = "has a caption file" if len(work.unreadable) == 1 else "have caption files"
        raise UserError(
            f"{work.target}: {len(work.unreadable)} of {count} clips {has} that cannot be read, which the table above names; "
            "save each as UTF-8 or delete it, and run this again; the other clips have been seen to"
        )
