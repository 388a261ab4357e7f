"""The command line: words in, one call of a command module out. Heavy rooms are imported by the command that needs them.

Exit status: 0 done, 1 a `UserError` while working, 2 a wrong command line or configuration, 130 interrupted; a training
run that a signal stopped and that was saved ends with 128 + the signal's number.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mochi_lora import __version__, cli_adapters, cli_demo
from mochi_lora.config.load import dump_config, find_config, load_config
from mochi_lora.config.problems import ConfigError, near_settings
from mochi_lora.config.reference import json_schema, reference_yaml
from mochi_lora.config.requests import AdapterChoice, EvaluationRequest, PlanRequest, SampleRequest, read_prompts
from mochi_lora.config.schema import Config
from mochi_lora.console import errors, hush_libraries
from mochi_lora.engine.allocator import expand_segments
from mochi_lora.errors import UserError
from mochi_lora.runs.called import Called

_OVERRIDE = re.compile(r"--\w+(\.\w+)+(=.*)?", re.DOTALL)
_INTERRUPTED = 130
# As in the rooms that own them, which would bring numpy and torch into `--help`.
PRECISIONS = ("bf16", "fp32")
STYLES = ("base", "chalk")
MOTIONS = ("left", "right", "up", "down", "still", "grows", "circles")


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status. Errors for people go to stderr, without a traceback."""
    words, overrides = split_overrides(argv)
    try:
        arguments, unknown = _parser().parse_known_args(words)
    except SystemExit as stop:  # argparse has said what it had to say
        return int(stop.code or 0)
    arguments.overrides = overrides
    arguments.command = shlex.join(["mochi-lora", *argv])
    hush_libraries()
    expand_segments()
    try:
        _refuse_unknown(unknown)
        arguments.run(arguments)
    except UserError as error:
        errors.print(f"error: {error}", markup=False)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        errors.print("interrupted")
        return _INTERRUPTED
    return 0


def entry() -> None:
    """The `mochi-lora` program."""
    sys.exit(main(sys.argv[1:]))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words for argparse, dotted overrides with their values). Only an override has a dot in its name."""
    words: list[str] = []
    overrides: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not _OVERRIDE.fullmatch(word):
            words.append(word)
            continue
        overrides.append(word)
        if "=" in word:
            continue
        value = next(rest, None)
        if value is not None and value.startswith("--"):  # `load_config` reports the missing value
            more_words, more_overrides = split_overrides([value, *rest])
            return words + more_words, overrides + more_overrides
        overrides += [] if value is None else [value]
    return words, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mochi-lora",
        description="LoRA fine-tuning of Mochi-1: clips -> cache -> adapter -> video.",
        epilog="Every setting can be given as --section.key VALUE; `mochi-lora config reference` lists and explains them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mochi-lora {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = partial(commands.add_parser, allow_abbrev=False)

    _add_download(add("download", help="the base model onto this machine, resumable"))
    doctor = add("doctor", help="is this machine fit? GPU, disk, packages, model files")
    _add_optional_config(doctor)
    doctor.add_argument("--json", action="store_true", help="the findings as JSON on stdout instead of a table")
    doctor.set_defaults(run=_doctor)
    prepare = add("prepare", help="raw footage -> a table of clips: split, filter, caption")
    _add_config(prepare)
    steps = prepare.add_mutually_exclusive_group()
    steps.add_argument("--only", choices=("split", "filter"), help="one step instead of all")
    steps.add_argument("--encode", action="store_true", help="then encode the clips as well, once each has a caption")
    prepare.set_defaults(run=_prepare)
    caption = add("caption", help="clips -> captions, and a sheet to correct them in")
    _add_config(caption)
    caption.set_defaults(run=_caption)
    encode = add("encode", help="clips and captions -> cached samples")
    _add_config(encode)
    encode.add_argument("--plan", action="store_true", help="only say what each clip would become; loads no model")
    encode.set_defaults(run=_encode)
    sheet = add("sheet", help="the data set -> a page: frames, captions, what looks wrong")
    _add_config(sheet)
    sheet.add_argument("--output", type=Path, metavar="FILE", help="page to write; default: RUN/dataset.html")
    sheet.set_defaults(run=_sheet)
    _add_plan(add("plan", help="memory, time and money on a GPU, before training"))
    train = add("train", help="cached samples -> adapter; run again to continue")
    _add_config(train)
    train.add_argument("--fresh", action="store_true", help="start over instead of continuing this run")
    cli_adapters.add_push(train)
    train.set_defaults(run=_train)
    _add_sample(add("sample", help="base and adapter -> videos"))
    _add_evaluate(add("evaluate", help="base against adapter -> a report: did it work?"))
    _add_inspect(add("inspect", help="tabulate the cache, decode samples back to video"))
    export = add("export", help="the data set -> a folder to share, cut without loss")
    _add_config(export)
    export.add_argument("folder", type=Path, help="folder to write: clips/, metadata.jsonl, README.md")
    export.set_defaults(run=_export)
    tiny = add("tiny", help="write a tiny Mochi for trying things", allow_abbrev=False)
    tiny.add_argument("folder", type=Path, help="folder to write, in diffusers layout")
    tiny.add_argument("--random", type=_count, metavar="SEED", help="random weights of this seed instead of the trained ones")
    tiny.set_defaults(run=_tiny)
    _add_draw(add("draw", help="draw a data set for mochi-tiny: clips with captions"))
    cli_demo.add_command(commands)
    cli_adapters.add_commands(commands)
    _add_print(add("config", help="print the reference, the schema, or a resolved file"))
    return parser


def _add_download(parser: argparse.ArgumentParser) -> None:
    _add_optional_config(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="of the transformer's files: bf16 (default, 20 GB, what must stay float32 is fetched apart) or fp32 (40 GB)",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="a plain folder instead of Hugging Face's cache")
    parser.add_argument("--verify", action="store_true", help="also compare the checksums of the files that are there already")
    parser.set_defaults(run=_download)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--decode", type=_count, default=0, metavar="N", help="decode the first N samples (default 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the decoded videos")
    parser.set_defaults(run=_inspect)


def _add_draw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder to write: NNN.mp4 with NNN.txt beside it")
    parser.add_argument(
        "--style", choices=STYLES, default="base", help="base is what mochi-tiny knows, chalk what it can learn"
    )
    parser.add_argument(
        "--motion",
        nargs="+",
        action="extend",
        choices=MOTIONS,
        default=[],
        metavar="NAME",
        help=f"only these: {' '.join(MOTIONS)} (default: all but circles, which mochi-tiny never saw)",
    )
    parser.add_argument("--count", type=_positive, default=48, metavar="N", help="clips (default 48)")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="which scenes (default 0)")
    parser.set_defaults(run=_draw)


def _add_print(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("reference", "schema", "show"),
        help="reference: every setting, explained; schema: JSON schema for editors; show: --config with overrides, resolved",
    )
    parser.add_argument("--config", metavar="FILE", help="for show; without it the defaults")
    parser.set_defaults(run=_print_config)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, as given or in configs/")
    parser.epilog = "--section.key VALUE changes a setting of the file, for instance --train.steps 500."


def _add_optional_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file, as given or in configs/; without it the defaults")
    parser.epilog = "--section.key VALUE changes a setting, for instance --model.base OWNER/NAME."


def _add_sample(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="P", help="instead of sample.prompts")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help=".txt with one prompt per line, or .jsonl")
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="adapters to use together, instead of the run's",
    )
    adapters.add_argument("--base-only", action="store_true", help="no adapter: the base model")
    parser.add_argument("--seed", nargs="+", type=_count, default=[], metavar="N", help="instead of sample.seeds")
    parser.add_argument(
        "--strengths", nargs="+", type=_finite, default=[], metavar="S", help="every video at each strength, 0 is the base"
    )
    parser.add_argument("--sweep", action="store_true", help="the adapters one by one, not together")
    parser.add_argument("--grid", action="store_true", help="also one video: a row per prompt, a column per version")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the videos; what is there already is kept")
    cli_adapters.add_assume_alpha(parser)
    parser.set_defaults(run=_sample)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--gpu", metavar="NAME", help="another GPU than this machine's, for instance 'RTX 4090'")
    parser.add_argument("--memory", metavar="SIZE", help="a GPU with this memory, for instance 24GiB")
    parser.add_argument("--gpus", type=_positive, metavar="N", help="so many of them, shared as engine.parallel says")
    parser.add_argument("--price", type=_price, metavar="USD", help="dollars per hour and GPU, instead of the table's")
    parser.add_argument("--measure", action="store_true", help="also run a few steps on random data, here")
    parser.set_defaults(run=_plan)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--quick", action="store_true", help="8 trigger prompts, 3 strengths, no checkpoints: indicative")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", type=Path, metavar="PATH", help="instead of the run's own")
    what.add_argument(
        "--from-videos", type=Path, metavar="DIR", help="clips made elsewhere: base/ and adapter/, or a videos.jsonl"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of videos and report; default: RUN/evaluation")
    cli_adapters.add_assume_alpha(parser)
    parser.set_defaults(run=_evaluate)


def _refuse_unknown(words: list[str]) -> None:
    if words:
        told = [f"{word}{near_settings(word.removeprefix('--'), option=True)}" for word in words]
        raise ConfigError("\n".join(["these words are not understood:", *(f"  {line}" for line in told)]))


def _count(text: str) -> int:
    """A whole number from 0 to 2^63 - 1, for argparse."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 2^63 - 1")
    return number


def _positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = _count(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def _finite(text: str) -> float:
    """A number that is one, for argparse."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return number


def _price(text: str) -> float:
    """A number above 0, for argparse: at 0 no figure of money would be told at all."""
    number = _finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of dollars above 0; leave it out for the table's price")
    return number


def _loaded(arguments: argparse.Namespace) -> Config:
    return load_config(find_config(arguments.config), arguments.overrides)


def _loaded_or_default(arguments: argparse.Namespace) -> Config:
    return load_config(find_config(arguments.config) if arguments.config else None, arguments.overrides)


def _called(arguments: argparse.Namespace) -> Called:
    return Called(arguments.config, tuple(arguments.overrides))


def _download(arguments: argparse.Namespace) -> None:
    config = _loaded_or_default(arguments)
    from mochi_lora.commands import download

    download.run(config, precision=arguments.precision, folder=arguments.to, verify=arguments.verify)


def _doctor(arguments: argparse.Namespace) -> None:
    config = _loaded_or_default(arguments)
    from mochi_lora.commands import doctor

    doctor.run(config, as_json=arguments.json)


def _prepare(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import prepare

    prepare.run(config, only=arguments.only, encode=arguments.encode, called=_called(arguments))


def _caption(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import caption

    caption.run(config)


def _encode(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    if arguments.plan:
        from mochi_lora.commands import encode_plan

        encode_plan.run(config, called=_called(arguments))
        return
    from mochi_lora.commands import encode

    encode.run(config, called=_called(arguments))


def _sheet(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import sheet

    sheet.run(config, output=arguments.output)


def _plan(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    request = PlanRequest(arguments.gpu, arguments.memory, arguments.price, measure=arguments.measure, gpus=arguments.gpus)
    from mochi_lora.commands import plan

    plan.run(config, request)


def _train(arguments: argparse.Namespace) -> None:
    config, push = _loaded(arguments), cli_adapters.hub_target(arguments)
    from mochi_lora.commands import train

    train.run(config, fresh=arguments.fresh, push=push, called=_called(arguments))


def _sample(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    prompts, own_seeds = read_prompts(arguments.prompts) if arguments.prompts else (tuple(arguments.prompt), ())
    request = SampleRequest(
        prompts=prompts,
        adapters=tuple(AdapterChoice.parse(text) for text in arguments.adapter),
        seeds=tuple(arguments.seed),
        output=arguments.output,
        assume_alpha_is_rank=arguments.assume_alpha == "rank",
        base_only=arguments.base_only,
        own_seeds=own_seeds,
        strengths=tuple(arguments.strengths),
        sweep=arguments.sweep,
        grid=arguments.grid,
    )
    from mochi_lora.commands import sample

    sample.run(config, request)


def _evaluate(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    request = EvaluationRequest(
        quick=arguments.quick,
        adapter=arguments.adapter,
        from_videos=arguments.from_videos,
        output=arguments.output,
        assume_alpha_is_rank=arguments.assume_alpha == "rank",
        command=arguments.command,
    )
    from mochi_lora.commands import evaluate

    evaluate.run(config, request)


def _inspect(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import inspect

    inspect.run(config, decode=arguments.decode, output=arguments.output)


def _export(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import export

    export.run(config, arguments.folder)


def _tiny(arguments: argparse.Namespace) -> None:
    _refuse_overrides(arguments, "tiny")
    from mochi_lora.commands import tiny

    tiny.run(arguments.folder, random=arguments.random)


def _draw(arguments: argparse.Namespace) -> None:
    _refuse_overrides(arguments, "draw")
    from mochi_lora.commands import draw

    draw.run(arguments.folder, style=arguments.style, motions=arguments.motion, count=arguments.count, seed=arguments.seed)


def _print_config(arguments: argparse.Namespace) -> None:
    if arguments.what == "show":
        sys.stdout.write(dump_config(_loaded_or_default(arguments)))
        return
    if arguments.config:
        raise ConfigError(f"config {arguments.what} does not depend on --config; leave it out, or use config show")
    _refuse_overrides(arguments, f"config {arguments.what}")
    told = reference_yaml() if arguments.what == "reference" else json.dumps(json_schema(), indent=2) + "\n"
    sys.stdout.write(told)


def _refuse_overrides(arguments: argparse.Namespace, command: str) -> None:
    if arguments.overrides:
        raise ConfigError(f"{command} takes no settings, got {' '.join(arguments.overrides)}")
