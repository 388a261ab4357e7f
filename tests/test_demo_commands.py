"""The commands that the demo shows, against what it does, and what it hands to its page."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from adapter_files import write_adapter
from served_demo import configuration
from test_demo import split_commands, wish

from mochi_lora.commands import demo
from mochi_lora.config.load import load_config
from mochi_lora.config.requests import AdapterChoice, DemoRequest
from mochi_lora.config.schema import Config
from mochi_lora.demo.command_text import sample_commands, settled
from mochi_lora.engine.plan import Plan
from mochi_lora.planning.cards import card_named
from mochi_lora.planning.choice import choose, room_of
from mochi_lora.planning.workload import ModelSize, Workload
from mochi_lora.runs.models import sampling_plan
from mochi_lora.runs.workloads import film_work


def test_a_command_names_what_the_demo_planned_where_its_own_plan_would_be_another(tiny, tmp_path) -> None:
    """On an L40S a video of 480x848 is guided in two passes, and a smaller one would be in one batch."""
    free = [f"--engine.{name}=auto" for name in ("precision", "attention", "checkpointing")]
    words = [*configuration(tiny, tmp_path)[0], "--sample.height=480", "--sample.width=848", *free, "--engine.compile=true"]
    file, card = Path(words[0].partition("=")[2]), card_named("L40S")
    config = load_config(file, words[1:])

    def planned(config: Config, beside_gib: float) -> Plan:
        films = film_work(config)
        work = Workload(ModelSize.of({}), films.bucket, 1, 1, None, films, beside_gib=beside_gib)
        return choose(config.engine, work, card, room_of(card.memory_gib, 128.0), "cudnn").pick.plan

    def repeated(started_with: Sequence[str]) -> tuple[list[str], Plan]:
        asked = wish(config.sample, frames=37, height=256, width=256)
        (command,) = split_commands(sample_commands(asked, config.sample, started_with))
        changes = [word for word in command if re.match(r"--\w+\.", word)]
        return changes, planned(load_config(file, changes), beside_gib=0.0)

    plan = planned(config, beside_gib=9.0)
    assert (plan.guidance_passes, repeated(words)[1].guidance_passes) == ("two", "one")
    changes, again = repeated(settled(words, config.engine, plan))
    told = ("precision", "attention", "compile", "guidance_passes")
    assert [getattr(again, name) for name in told] == [getattr(plan, name) for name in told]
    engine = sorted(word for word in changes if word.startswith("--engine."))
    assert engine == [
        "--engine.attention=cudnn",
        "--engine.checkpointing=auto",
        "--engine.compile=true",
        "--engine.guidance_passes=two",
        "--engine.precision=bf16",
    ]


def test_the_demo_opens_its_page_with_what_it_planned_and_with_room_for_what_it_offers(tiny, tmp_path, monkeypatch) -> None:
    from mochi_lora.demo import page, serve  # Gradio takes seconds to import

    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # put back afterwards
    words, config = configuration(tiny, tmp_path)
    file = write_adapter(tmp_path / "style.safetensors", tiny, 1)
    offers, samplers = [], []
    monkeypatch.setattr(page, "build", lambda offer, *_: offers.append(offer))
    monkeypatch.setattr(serve, "server_of", lambda *_: SimpleNamespace(run=lambda sockets: None))
    monkeypatch.setattr(demo, "Session", lambda sampler, *_, **__: samplers.append(sampler) or SimpleNamespace(make=max))
    demo.run(config, DemoRequest(port=0, adapters=(AdapterChoice(file),), started_with=tuple(words)))
    assert offers[0].started_with == settled(words, config.engine, sampling_plan(config).plan) != tuple(words)
    assert list(samplers[0]._model.transformer.peft_config) == ["slot0"]
