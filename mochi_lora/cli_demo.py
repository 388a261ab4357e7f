"""The words of `mochi-lora demo`. As in `cli`, heavy rooms wait for the command."""

import argparse
from collections.abc import Iterator, Sequence

from mochi_lora.cli_adapters import add_assume_alpha
from mochi_lora.config.load import find_config, load_config
from mochi_lora.config.requests import AdapterChoice, DemoRequest


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo`."""
    parser = commands.add_parser("demo", help="a page to try base and adapters side by side", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, as given or in configs/")
    parser.epilog = "--section.key VALUE changes a setting of the file, for instance --sample.steps 32."
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="adapters to offer, switched on, besides those in the run's folder",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=7860, metavar="N", help="port to listen on (default 7860)")
    guard = parser.add_mutually_exclusive_group()
    guard.add_argument(
        "--password", metavar="FILE_OR_ENV", help="environment variable or file that holds a password; asked for with a login"
    )
    guard.add_argument("--open-to-anyone", action="store_true", help="allow a --host that others can reach, without a password")
    parser.add_argument("--cpu-offload", action="store_true", help="keep on the GPU only the part that is working")
    add_assume_alpha(parser)
    parser.set_defaults(run=_demo)


def _port(text: str) -> int:
    """0 to 65535, for argparse; 0 takes any that is free."""
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 65535")
    return number


def _one_word_each(overrides: Sequence[str]) -> Iterator[str]:
    """`--a.b 1` and `--a.b=1` both as the latter; the overrides have been understood, so every name has its value."""
    words = iter(overrides)
    for word in words:
        yield word if "=" in word else f"{word}={next(words)}"


def _demo(arguments: argparse.Namespace) -> None:
    overrides = [*arguments.overrides, *(["--engine.cpu_offload=true"] if arguments.cpu_offload else [])]
    assumed = [f"--assume-alpha={arguments.assume_alpha}"] if arguments.assume_alpha else []
    config = load_config(find_config(arguments.config), overrides)
    request = DemoRequest(
        host=arguments.host,
        port=arguments.port,
        password=arguments.password,
        open_to_anyone=arguments.open_to_anyone,
        adapters=tuple(AdapterChoice.parse(text) for text in arguments.adapter),
        assume_alpha_is_rank=arguments.assume_alpha == "rank",
        started_with=(f"--config={arguments.config}", *assumed, *_one_word_each(overrides)),
    )
    from mochi_lora.commands import demo

    demo.run(config, request)
