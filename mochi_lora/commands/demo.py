"""`mochi-lora demo`: the page in which base and adapter are tried side by side."""

import importlib.util
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from mochi_lora.config.requests import AdapterChoice, DemoRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.demo.access import USER, read_password, require_guarded
from mochi_lora.demo.command_text import settled
from mochi_lora.demo.session import Event, Made, Session
from mochi_lora.demo.turns import Turns
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError, install_command
from mochi_lora.files import remove_abandoned
from mochi_lora.inference.live import LiveSampler
from mochi_lora.inference.shots import short_names
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.runs.folder import best_adapter, final_adapter, step_adapters
from mochi_lora.runs.models import load_sampler, load_text, sampling_plan
from mochi_lora.runs.processes import out_of_memory_named
from mochi_lora.runs.videos import origin_of

_Offered = tuple[str, AdapterChoice, bool]  # label, file and strength, whether it is on at first


def run(config: Config, request: DemoRequest) -> None:
    """Serve the page until interrupted. Raises UserError for what a person can mend, before the models are loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"mochi-lora demo needs the package gradio: {install_command('demo')}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from mochi_lora.demo import page, serve  # noqa: PLC0415 - an extra

    password = read_password(request.password) if request.password else None
    require_guarded(request.host, password, open_to_anyone=request.open_to_anyone)
    for choice in request.adapters:
        load_adapter(choice.path, assume_alpha_is_rank=request.assume_alpha_is_rank)
    adapters = _adapters(config, request.adapters)
    with out_of_memory_named():
        resolved = sampling_plan(config, with_text=True)
    plan, when_full = resolved.plan, resolved.when_full()
    if plan.cpu_offload and config.encode.text_precision == "int8":
        raise UserError("encode.text_precision int8: such weights cannot be moved to offload them; take bf16, or no offload")
    folder = config.run.folder / "demo"
    turns: Turns[Event, Made] = Turns()
    with (
        serve.open_socket(request.host, request.port) as socket,
        tempfile.TemporaryDirectory(prefix="mochi-lora-demo-") as served,
    ):
        os.environ["GRADIO_TEMP_DIR"] = served  # Gradio serves copies of videos; these go with the command
        with out_of_memory_named(when_full):
            session = _open_session(config, plan, folder, adapters, assume_alpha_is_rank=request.assume_alpha_is_rank)
        offer = page.Offer(
            about=_about(config, plan),
            prompt=config.sample.prompts[0] if config.sample.prompts else "",
            settings=config.sample,
            adapters=tuple(page.Offered(label, choice, chosen) for label, choice, chosen in adapters),
            started_with=settled(request.started_with, config.engine, plan),
            folder=folder,
        )
        blocks = page.build(offer, out_of_memory_named(when_full)(session.make), turns)
        server = serve.server_of(blocks, folder, password)
        host, port = socket.getsockname()[:2]
        console.print(f"page     http://{f'[{host}]' if ':' in host else host}:{port}", markup=False)
        if password is not None:
            console.print(f"login    {USER}, and the password in {request.password}", markup=False)
        console.print("stop     Ctrl-C")
        try:
            server.run(sockets=[socket])
        finally:
            turns.cancel_all()


def _open_session(
    config: Config, plan: Plan, folder: Path, adapters: Sequence[_Offered], *, assume_alpha_is_rank: bool
) -> Session:
    """Under offloading, T5 rests on the CPU, as the VAE does."""
    device, offload = torch.device(plan.device), plan.cpu_offload
    console.print(f"loading  {config.model.base}", markup=False)
    text = load_text(config, device=torch.device("cpu") if offload else device)
    sampler = load_sampler(config, plan, assume_alpha_is_rank=assume_alpha_is_rank)
    make_room(sampler, adapters)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    return Session(sampler, text, folder, origin_of(config, plan), device=device, offload=offload)


def make_room(sampler: LiveSampler, adapters: Iterable[_Offered]) -> None:
    """Slots for each adapter alone, for any two, and for those that are on at first: one made later compiles the base anew.

    A file that cannot be used is told here, and on the page when it is chosen.
    """
    usable, together = [], []
    for _, choice, is_on in adapters:
        try:
            sampler.make_room([choice.path])
        except UserError as error:
            console.print(f"not usable: {error}", style="yellow", markup=False)
        else:
            usable.append(choice.path)
            together += [choice.path] * is_on
    sampler.make_room(usable, at_once=2)
    sampler.make_room(together)


def _adapters(config: Config, asked: Sequence[AdapterChoice]) -> list[_Offered]:
    """Those asked for, then the run's. Without any asked for, the run's final adapter is on."""
    final = final_adapter(config)
    found = [final, best_adapter(config), *(path for _, path in reversed(step_adapters(config)))]
    own = [AdapterChoice(path, config.sample.strength) for path in found if path.is_file()]
    given = {choice.path.absolute() for choice in asked}
    offered = [*asked, *(choice for choice in own if choice.path.absolute() not in given)]
    names = short_names([choice.path for choice in offered])
    return [(names[one.path], one, one in asked or (not asked and one.path == final)) for one in offered]


def _about(config: Config, plan: Plan) -> str:
    where = torch.cuda.get_device_name() if plan.device == "cuda" else "the CPU"
    return f"{config.model.base} on {where}, {plan.precision}; run {config.run.folder}"
