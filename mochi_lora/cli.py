"""The command line: words in, one call of a command module out. Heavy rooms are imported by the command that needs them.

Exit status: 0 done, 1 a `UserError` while working, 2 a wrong command line or configuration, 130 interrupted; a training
run that a signal stopped and that was saved ends with 128 + the signal's number.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mochi_lora import __version__
from mochi_lora.config.load import dump_config, find_config, load_config
from mochi_lora.config.problems import ConfigError, near_settings
from mochi_lora.config.reference import json_schema, reference_yaml
from mochi_lora.config.requests import AdapterChoice, SampleRequest, read_prompts
from mochi_lora.config.schema import Config
from mochi_lora.console import errors, hush_libraries
from mochi_lora.errors import UserError

_OVERRIDE = re.compile(r"--\w+(\.\w+)+(=.*)?", re.DOTALL)
_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status. Errors for people go to stderr, without a traceback."""
    words, overrides = split_overrides(argv)
    try:
        arguments, unknown = _parser().parse_known_args(words)
    except SystemExit as stop:  # argparse has said what it had to say
        return int(stop.code or 0)
    arguments.overrides = overrides
    hush_libraries()
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

    encode = commands.add_parser("encode", help="clips and captions -> cached samples", allow_abbrev=False)
    _add_config(encode)
    encode.set_defaults(run=_encode)
    train = commands.add_parser("train", help="cached samples -> adapter; run again to continue", allow_abbrev=False)
    _add_config(train)
    train.add_argument("--fresh", action="store_true", help="start over instead of continuing this run")
    train.set_defaults(run=_train)
    _add_sample(commands.add_parser("sample", help="base and adapter -> videos", allow_abbrev=False))
    _add_inspect(commands.add_parser("inspect", help="tabulate the cache, decode samples back to video", allow_abbrev=False))
    tiny = commands.add_parser("tiny", help="build a tiny Mochi with random weights, for trying things", allow_abbrev=False)
    tiny.add_argument("folder", type=Path, help="folder to write, in diffusers layout")
    tiny.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the weights (default 0)")
    tiny.set_defaults(run=_tiny)
    _add_print(commands.add_parser("config", help="print the reference, the schema, or a resolved file", allow_abbrev=False))
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--decode", type=_count, default=0, metavar="N", help="decode the first N samples (default 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the decoded videos")
    parser.set_defaults(run=_inspect)


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
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the videos")
    parser.add_argument(
        "--assume-alpha",
        choices=("rank",),
        help="what alpha is for adapter files that do not say; they are refused otherwise",
    )
    parser.set_defaults(run=_sample)


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


def _loaded(arguments: argparse.Namespace) -> Config:
    return load_config(find_config(arguments.config), arguments.overrides)


def _encode(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import encode

    encode.run(config)


def _train(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import train

    train.run(config, fresh=arguments.fresh)


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
    )
    from mochi_lora.commands import sample

    sample.run(config, request)


def _inspect(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import inspect

    inspect.run(config, decode=arguments.decode, output=arguments.output)


def _tiny(arguments: argparse.Namespace) -> None:
    _refuse_overrides(arguments, "tiny")
    from mochi_lora.commands import tiny

    tiny.run(arguments.folder, seed=arguments.seed)


def _print_config(arguments: argparse.Namespace) -> None:
    if arguments.what == "show":
        path = find_config(arguments.config) if arguments.config else None
        sys.stdout.write(dump_config(load_config(path, arguments.overrides)))
        return
    if arguments.config:
        raise ConfigError(f"config {arguments.what} does not depend on --config; leave it out, or use config show")
    _refuse_overrides(arguments, f"config {arguments.what}")
    told = reference_yaml() if arguments.what == "reference" else json.dumps(json_schema(), indent=2) + "\n"
    sys.stdout.write(told)


def _refuse_overrides(arguments: argparse.Namespace, command: str) -> None:
    if arguments.overrides:
        raise ConfigError(f"{command} takes no settings, got {' '.join(arguments.overrides)}")
