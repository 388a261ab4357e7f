"""The words `convert`, `lora`, `card` and `publish` of the command line. As in `cli`, heavy rooms wait for their command."""

import argparse
from pathlib import Path

from mochi_lora.config.load import find_config, load_config
from mochi_lora.config.problems import ConfigError
from mochi_lora.config.requests import AdapterChoice, HubTarget
from mochi_lora.config.schema import Config

# As in the rooms that own them, which would bring torch into `--help`.
FORMATS = ("diffusers", "genmo", "comfyui")
BASE_FORMATS = ("diffusers", "genmo", "fp8")
_MERGE_USAGE = "mochi-lora lora merge PATH[:WEIGHT] [PATH[:WEIGHT] ...] OUT"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `convert lora|base`, `lora merge|resize|extract|inspect`, `card` and `publish`."""
    convert = commands.add_parser("convert", help="adapters and bases from and to other makers' formats", allow_abbrev=False)
    kinds = convert.add_subparsers(title="what", required=True, metavar="WHAT")
    _add_convert_lora(kinds.add_parser("lora", help="an adapter: diffusers, Genmo, ComfyUI", allow_abbrev=False))
    _add_convert_base(kinds.add_parser("base", help="transformer or VAE: Genmo, diffusers", allow_abbrev=False))
    lora = commands.add_parser("lora", help="merge, resize, extract or inspect adapter files", allow_abbrev=False)
    verbs = lora.add_subparsers(title="what", required=True, metavar="WHAT")
    _add_merge(verbs.add_parser("merge", help="several adapters, weighted, as one; or into the base", allow_abbrev=False))
    resize = verbs.add_parser("resize", help="a lower rank, by singular values", allow_abbrev=False)
    _add_paths(resize, adapter="adapter file of any layout", output="file to write, in the same layout")
    resize.add_argument("--rank", type=_rank, required=True, metavar="R", help="highest rank of a linear")
    add_assume_alpha(resize)
    resize.set_defaults(run=_resize)
    extract = verbs.add_parser("extract", help="an adapter out of a fine-tuned base", allow_abbrev=False)
    _add_paths(
        extract,
        base="transformer folder, model folder, or Genmo's dit.safetensors",
        tuned="the same, fine-tuned",
        output="adapter file to write, in diffusers' layout",
    )
    extract.add_argument("--rank", type=_rank, required=True, metavar="R", help="rank of every linear")
    extract.set_defaults(run=_extract)
    inspect = verbs.add_parser("inspect", help="rank, alpha, targets, norms, training settings", allow_abbrev=False)
    _add_paths(inspect, adapter="adapter file of any layout")
    add_assume_alpha(inspect)
    inspect.set_defaults(run=_inspect)
    _add_card(commands.add_parser("card", help="adapter -> a folder to publish: model card, videos", allow_abbrev=False))
    publish = commands.add_parser("publish", help="that folder -> the Hugging Face hub", allow_abbrev=False)
    _add_config(publish)
    publish.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository; made where there is none")
    publish.add_argument("--folder", type=Path, metavar="DIR", help="a folder that `card` wrote; default: RUN/publish")
    _add_private(publish)
    publish.set_defaults(run=_publish)


def add_push(train: argparse.ArgumentParser) -> None:
    """Add --push-to-hub and --private."""
    train.add_argument("--push-to-hub", metavar="OWNER/NAME", help="at the end, publish adapter and card there")
    _add_private(train)


def hub_target(arguments: argparse.Namespace) -> HubTarget | None:
    """Where `train` is to publish."""
    if arguments.push_to_hub is None and arguments.private:
        raise ConfigError("--private is about the repository; give --push-to-hub OWNER/NAME as well, or leave it out")
    return HubTarget(arguments.push_to_hub, arguments.private) if arguments.push_to_hub else None


def _add_private(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", help="a repository that you alone see; without, a new one is public")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file, as given or in configs/")


def _add_card(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="instead of the run's final one")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write; default: RUN/publish")
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="licence of the adapter, as the hub calls it, such as cc-by-4.0",
    )
    parser.set_defaults(run=_card)


def _add_convert_lora(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser, adapter="adapter file; its layout is recognised", output="file to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="layout to write")
    parser.add_argument(
        "--rank",
        type=_rank,
        metavar="R",
        help="at most this rank per linear of that layout, by singular values; default: exact",
    )
    add_assume_alpha(parser)
    parser.set_defaults(run=_convert_lora)


def _add_convert_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="IN",
        help="dit.safetensors; or encoder.safetensors and decoder.safetensors; or, to genmo, a transformer or vae folder; or, "
        "to fp8, dit.safetensors or a transformer folder",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write; to genmo also a .safetensors file")
    parser.add_argument(
        "--to",
        choices=BASE_FORMATS,
        default="diffusers",
        help="layout to write (default diffusers); fp8 is half the size, for engine.precision fp8",
    )
    parser.set_defaults(run=_convert_base)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", metavar="PATH[:WEIGHT]", help="adapter files of any layout; weight 1 unless said"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write; with --into-base a transformer folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rank", type=_rank, metavar="R", help="at most this rank, by singular values; default: all ranks, exact")
    how.add_argument("--into-base", type=Path, metavar="FOLDER", help="transformer or model folder to add the sum to")
    parser.add_argument("--float32", action="store_true", help="with --into-base: store the changed linears in float32")
    add_assume_alpha(parser)
    parser.set_defaults(run=_merge)


def _add_paths(parser: argparse.ArgumentParser, **helps: str) -> None:
    for name, told in helps.items():
        parser.add_argument(name, type=Path, metavar=name.upper(), help=told)


def add_assume_alpha(parser: argparse.ArgumentParser) -> None:
    """Add --assume-alpha, for every command that reads adapter files."""
    told = "what alpha is for adapter files that do not say; they are refused otherwise"
    parser.add_argument("--assume-alpha", choices=("rank",), help=told)


def _rank(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def _convert_lora(arguments: argparse.Namespace) -> None:
    _refuse_settings(arguments, "convert")
    from mochi_lora.commands import convert

    assumed = arguments.assume_alpha == "rank"
    convert.run_lora(arguments.adapter, arguments.output, to=arguments.to, rank=arguments.rank, assume_alpha_is_rank=assumed)


def _convert_base(arguments: argparse.Namespace) -> None:
    _refuse_settings(arguments, "convert")
    from mochi_lora.commands import convert

    convert.run_base(arguments.sources, arguments.output, to=arguments.to)


def _merge(arguments: argparse.Namespace) -> None:
    _refuse_settings(arguments, "lora")
    if arguments.float32 and arguments.into_base is None:
        raise ConfigError("--float32 is about the base's linears; give --into-base FOLDER as well, or leave it out")
    _refuse_adapter_as_output(arguments.output)
    choices = [AdapterChoice.parse(text) for text in arguments.adapters]
    from mochi_lora.commands import lora

    lora.run_merge(
        choices,
        arguments.output,
        rank=arguments.rank,
        base=arguments.into_base,
        float32=arguments.float32,
        assume_alpha_is_rank=arguments.assume_alpha == "rank",
    )


def _refuse_adapter_as_output(output: Path) -> None:
    """Where OUT is forgotten argparse takes the last adapter for it, and a merge without that adapter would be written."""
    before, colon, after = str(output).rpartition(":")
    if colon and (_is_number(after) or Path(before).is_file()):
        message = f"OUT {str(output)!r}: reads like an adapter with its weight; expected the file to write after the adapters"
        raise ConfigError(f"{message}: {_MERGE_USAGE}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _resize(arguments: argparse.Namespace) -> None:
    _refuse_settings(arguments, "lora")
    from mochi_lora.commands import lora

    assumed = arguments.assume_alpha == "rank"
    lora.run_resize(arguments.adapter, arguments.output, rank=arguments.rank, assume_alpha_is_rank=assumed)


def _extract(arguments: argparse.Namespace) -> None:
    _refuse_settings(arguments, "lora")
    from mochi_lora.commands import lora

    lora.run_extract(arguments.base, arguments.tuned, arguments.output, rank=arguments.rank)


def _inspect(arguments: argparse.Namespace) -> None:
    _refuse_settings(arguments, "lora")
    from mochi_lora.commands import lora_inspect

    lora_inspect.run(arguments.adapter, assume_alpha_is_rank=arguments.assume_alpha == "rank")


def _card(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import card

    card.run(config, adapter=arguments.adapter, output=arguments.output, licence=arguments.license)


def _publish(arguments: argparse.Namespace) -> None:
    config = _loaded(arguments)
    from mochi_lora.commands import publish
    from mochi_lora.runs.folder import card_folder

    publish.run(arguments.folder or card_folder(config), HubTarget(arguments.repo, arguments.private))


def _loaded(arguments: argparse.Namespace) -> Config:
    return load_config(find_config(arguments.config), arguments.overrides)


def _refuse_settings(arguments: argparse.Namespace, command: str) -> None:
    if arguments.overrides:
        raise ConfigError(f"{command} takes no settings, got {' '.join(arguments.overrides)}")
