"""The demo below its page: what may be filled in, what a click makes, whose turn it is, who may come in."""

import json
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_files import write_adapter
from served_demo import configuration, open_session
from tiny_commands import ROOT

from mochi_lora.cli import main
from mochi_lora.commands import demo
from mochi_lora.config.load import load_config
from mochi_lora.config.requests import AdapterChoice, DemoRequest
from mochi_lora.config.schema import SampleConfig
from mochi_lora.demo.access import USER, is_loopback, login, read_password, require_guarded
from mochi_lora.demo.command_text import sample_commands, settled
from mochi_lora.demo.form import Form, FormError, Wish, read_form, shown_scales
from mochi_lora.demo.session import Filmed, Phase, Progress, Session
from mochi_lora.demo.status import left, line, problem, told
from mochi_lora.demo.turns import MOST_WAITING, AlreadyAtWorkError, Turns, Waiting
from mochi_lora.errors import UserError, install_command
from mochi_lora.inference.sampler import Cancelled
from mochi_lora.runs.models import sampling_plan

FOX = "a fox in the snow"
GOOD = {
    "prompt": FOX,
    "negative_prompt": "",
    "steps": 2.0,
    "guidance": "6",
    "seed": "0",
    "frames": 7,
    "width": 48,
    "height": 32.0,
    "adapters": (),
    "compare": True,
}


def wish(defaults: SampleConfig | None = None, **changed) -> Wish:
    return read_form(Form(**{**GOOD, **changed}), defaults or SampleConfig())


# --- the form -----------------------------------------------------------------------------------------------------------


def test_what_is_filled_in_becomes_settings_and_the_rest_is_the_configurations():
    asked = wish(SampleConfig(threshold_noise=0.03), steps=3.0, guidance="5, 2, 1", seed=" 9223372036854775807 ")
    assert (asked.settings.steps, asked.settings.guidance, asked.seed) == (3, [5.0, 2.0, 1.0], 2**63 - 1)
    assert (asked.settings.frames, asked.settings.height, asked.settings.width) == (7, 32, 48)
    assert asked.settings.threshold_noise == 0.03


@pytest.mark.parametrize(
    ("field", "changed", "expected"),
    [
        ("prompt", {"prompt": " \n"}, "write what the video should show"),
        ("steps", {"steps": 1}, "got 1, expected greater than or equal to 2"),
        ("steps", {"steps": 2.5}, "got 2.5, expected a valid integer"),
        ("steps", {"steps": None}, "got nothing, expected a whole number"),
        ("steps", {"steps": 1e12}, "expected at most 1000"),
        ("guidance", {"guidance": "six"}, "got six, expected a number, or one per step"),
        ("guidance", {"guidance": ""}, "got nothing, expected a number"),
        ("guidance", {"guidance": "nan"}, "got nan, expected a finite number"),
        ("guidance", {"guidance": "6, 6, 6"}, "guidance has 3 values for 2 steps"),
        ("seed", {"seed": "-1"}, "got -1, expected greater than or equal to 0"),
        ("seed", {"seed": "9" * 20}, "expected less than 9223372036854775808"),
        ("seed", {"seed": "1.5"}, "got 1.5, expected a whole number"),
        ("frames", {"frames": 8}, "8 frames: Mochi takes 6k+1 frames, use 7 or 13"),
        ("frames", {"frames": 6001}, "expected at most 331"),
        ("size", {"width": 100}, "Mochi takes multiples of 16, use 96 or 112"),
        ("size", {"height": 1e9}, "expected at most 2048"),
        ("size", {"height": 0}, "multiples of 16"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_at_its_field(field, changed, expected):
    with pytest.raises(FormError) as refused:
        wish(**changed)
    assert list(refused.value.problems) == [field]
    assert expected in refused.value.problems[field]


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_the_page():
    with pytest.raises(FormError) as refused:
        wish(seed="x", prompt="", steps=0, frames=8, width=1)
    assert list(refused.value.problems) == ["prompt", "steps", "seed", "frames", "size"]


def test_too_few_steps_for_the_configured_schedule_are_told_at_the_steps():
    with pytest.raises(FormError) as refused:
        wish(SampleConfig(steps=16, linear_steps=8), steps=4)
    assert list(refused.value.problems) == ["steps"]


def test_settings_of_a_preset_may_be_changed_one_by_one():
    preset = SampleConfig(preset="fastmochi")
    asked = wish(preset, steps=12, guidance=shown_scales(preset.guidance))
    assert (asked.settings.steps, asked.settings.guidance) == (12, preset.guidance)
    assert (asked.settings.threshold_noise, asked.settings.linear_steps) == (preset.threshold_noise, preset.linear_steps)


def test_what_people_typed_is_never_markup():
    assert "<script>" not in problem("prompt", "<script>") + line("<script>", fraction=0.5) + told(Phase("<script>"))


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.2, "1 s"), (41.2, "42 s"), (150, "3 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_time_left_is_told_as_an_estimate(seconds, expected):
    assert left(seconds) == f"about {expected} left"


# --- a click ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"{name}.safetensors", tiny, seed) for seed, name in ((1, "style"), (2, "motion"))]


@pytest.fixture(scope="module")
def words(tiny, tmp_path_factory):
    return configuration(tiny, tmp_path_factory.mktemp("run"))[0]


@pytest.fixture
def session(tiny, tmp_path):
    return open_session(configuration(tiny, tmp_path)[1], tmp_path / "demo")


def made(session: Session, asked: Wish) -> tuple[list, dict[str, str]]:
    """Events of a click, and the hash of each side's frames."""
    events = []
    session.make(asked, events.append, lambda: False)
    films = {event.side: event.path for event in events if isinstance(event, Filmed)}
    return events, {side: json.loads(path.with_suffix(".json").read_text())["frames_sha256"] for side, path in films.items()}


def test_base_and_adapter_are_made_and_every_step_is_told(session, adapters):
    events, frames = made(session, wish(adapters=(AdapterChoice(adapters[0], 0.8),)))
    assert list(frames) == ["base", "adapter"]
    assert frames["base"] != frames["adapter"]
    steps = [(event.side, event.done) for event in events if isinstance(event, Progress)]
    assert steps == [(side, done) for side in ("base", "adapter") for done in (0, 1, 2)]
    left = [event.seconds_left for event in events if isinstance(event, Progress)]
    assert left[0] is None
    assert left[-1] == 0
    assert all(seconds > 0 for seconds in left[1:-1])


def test_the_base_is_made_once_for_all_strengths(session, adapters):
    _, frames = made(session, wish(adapters=(AdapterChoice(adapters[0], 0.8),)))
    second, again = made(session, wish(adapters=(AdapterChoice(adapters[0], 0.4),)))
    assert {event.side for event in second if isinstance(event, Progress)} == {"adapter"}
    assert again["base"] == frames["base"]
    assert again["adapter"] != frames["adapter"]


def test_strength_zero_is_the_base_bit_for_bit(session, adapters):
    _, frames = made(session, wish(adapters=tuple(AdapterChoice(path, 0.0) for path in adapters)))
    assert frames["adapter"] == frames["base"]


def test_the_commands_shown_make_the_same_frames(session, adapters, words, tmp_path):
    asked = wish(
        prompt='--it\'s a.fox:\n"in" $HOME',
        negative_prompt="-fog",
        guidance="3, 1.5",
        seed="7",
        width=64,
        adapters=(AdapterChoice(adapters[1], 0.35), AdapterChoice(adapters[0], -0.5)),
    )
    _, frames = made(session, asked)
    config = load_config(Path(words[0].partition("=")[2]), words[1:])
    commands = sample_commands(asked, config.sample, settled(words, config.engine, sampling_plan(config, with_text=True).plan))
    assert "--engine.guidance_passes=two" in commands
    for number, (side, command) in enumerate(zip(("base", "adapter"), split_commands(commands), strict=True)):
        assert command[:2] == ["mochi-lora", "sample"]
        output = tmp_path / str(number)
        assert main([*command[1:], "--output", str(output)]) == 0
        (about,) = output.glob("*.json")
        assert json.loads(about.read_text())["frames_sha256"] == frames[side]


def split_commands(text: str) -> list[list[str]]:
    """As a shell reads several lines, a line break inside quotes being none."""
    words = shlex.split(text)
    starts = [at for at, word in enumerate(words) if word == "mochi-lora"]
    return [words[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def test_a_command_says_each_setting_once_and_all_that_a_preset_stood_for():
    preset = SampleConfig(preset="fastmochi")
    (command,) = split_commands(
        sample_commands(wish(preset, steps=12), preset, ["--config=a b.yaml", "--sample.steps=9", "--run.folder=x"])
    )
    assert [word for word in command if word.startswith("--sample.steps")] == ["--sample.steps=12"]
    assert {"--config=a b.yaml", "--run.folder=x", "--base-only", "--sample.preset=null"} <= set(command)
    assert f"--sample.threshold_noise={preset.threshold_noise}" in command


def test_cancelling_leaves_no_video_and_the_next_click_works(session, adapters):
    events, asked = [], wish(adapters=(AdapterChoice(adapters[0]),), compare=False)
    with pytest.raises(Cancelled):
        session.make(asked, events.append, lambda: any(isinstance(event, Progress) and event.done for event in events))
    assert [event.done for event in events if isinstance(event, Progress)] == [0, 1]
    assert not list(session._folder.iterdir())
    assert list(made(session, asked)[1]) == ["adapter"]


@pytest.mark.parametrize(
    ("field", "changed", "expected"),
    [
        ("prompt", {"prompt": "一只兔子"}, "every token is unknown to T5"),
        ("negative_prompt", {"negative_prompt": "雾"}, "translate it"),
        ("adapters", {"adapters": (AdapterChoice(Path("nowhere.safetensors")),)}, "nowhere.safetensors: no such adapter file"),
    ],
)
def test_what_only_the_models_can_refuse_is_told_at_its_field_too(session, field, changed, expected):
    with pytest.raises(FormError) as refused:
        session.make(wish(**changed), lambda _event: None, lambda: False)
    assert expected in refused.value.problems[field]


def test_words_that_t5_cuts_or_does_not_know_are_told(session):
    told = session.make(wish(prompt=f"{'a fox ' * 300} 雪"), lambda _event: None, lambda: False).notes
    assert any("cut at 256 tokens" in note for note in told)
    assert any("unknown to T5" in note for note in told)
    assert session.make(wish(), lambda _event: None, lambda: False).notes == ()


def test_a_click_repeated_is_answered_from_what_is_there(session):
    _, frames = made(session, wish())
    notes = session.make(wish(), lambda _event: None, lambda: False).notes
    assert notes == ("The base video was made before, with the same settings.",)
    assert made(session, wish())[1] == frames


# --- turns --------------------------------------------------------------------------------------------------------------


def run(turns: Turns, owner: str, work) -> Iterator[list]:
    """A place in the line and the work on it, as a click takes both."""
    with turns.place(owner) as place:
        yield from turns.run(place, work)


def test_one_works_at_a_time_in_order_and_the_others_are_told_how_many_are_before():
    turns, gate, order = Turns(), threading.Event(), []

    def work(name):
        def do(report, cancelled):
            order.append(f"{name} begins")
            assert gate.wait(20)
            report(name)
            order.append(f"{name} ends")

        return do

    told = {name: [] for name in "abc"}
    threads = []
    for number, name in enumerate("abc"):
        threads.append(threading.Thread(target=lambda name=name: told[name].extend(run(turns, name, work(name)))))
        threads[-1].start()
        while len(turns._line) == number:
            pass
    gate.set()
    for thread in threads:
        thread.join(20)
    assert order == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]
    assert told["a"] == [["a"]]
    assert told["b"] == [[Waiting(1)], ["b"]]
    assert told["c"][0] == [Waiting(2)]
    assert told["c"][-1] == ["c"]


def test_who_waits_may_cancel_and_who_is_at_work_may_not_come_twice():
    turns, gate = Turns(), threading.Event()
    first = run(turns, "a", lambda report, cancelled: (report("begun"), gate.wait(20)))
    assert next(first) == ["begun"]
    with pytest.raises(AlreadyAtWorkError, match="at work already"):
        next(run(turns, "a", lambda report, cancelled: None))
    second = run(turns, "b", lambda report, cancelled: pytest.fail("cancelled before its turn"))
    assert next(second) == [Waiting(1)]
    turns.cancel("b")
    with pytest.raises(Cancelled):
        next(second)
    gate.set()
    assert list(first) == []
    assert turns._line == []


def test_a_full_line_takes_nobody_else():
    turns, gate = Turns(), threading.Event()
    jobs = [run(turns, str(number), lambda report, cancelled: (report("begun"), gate.wait(20))) for number in range(17)]
    for job in jobs:
        next(job)
    with pytest.raises(UserError, match=f"{MOST_WAITING} others are waiting"):
        next(run(turns, "late", lambda report, cancelled: None))
    gate.set()
    for job in jobs:
        list(job)


def test_a_listener_that_leaves_cancels_and_makes_room():
    turns, seen = Turns(), []

    def work(report, cancelled):
        report("begun")
        while not cancelled():
            pass
        seen.append("cancelled")

    job = run(turns, "a", work)
    next(job)
    job.close()
    assert seen == ["cancelled"]
    assert turns._line == []


def test_what_work_raises_reaches_the_listener():
    turns = Turns()
    with pytest.raises(FormError):
        list(run(turns, "a", lambda report, cancelled: wish(prompt="")))
    assert turns._line == []


# --- who may come in ----------------------------------------------------------------------------------------------------


def test_a_host_that_others_reach_needs_a_password_or_plain_words():
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert is_loopback(host)
        require_guarded(host, None, open_to_anyone=False)
    for host in ("0.0.0.0", "::", "192.168.0.7", "gpu.example"):  # noqa: S104
        assert not is_loopback(host)
        with pytest.raises(UserError, match=r"--password FILE_OR_ENV.*--open-to-anyone"):
            require_guarded(host, None, open_to_anyone=False)
        require_guarded(host, "secret", open_to_anyone=False)
        require_guarded(host, None, open_to_anyone=True)


def test_a_password_comes_from_a_variable_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_PASSWORD", "from outside\n")
    (tmp_path / "password").write_text("kept\n")
    assert read_password("DEMO_PASSWORD") == "from outside"
    assert read_password(str(tmp_path / "password")) == "kept"
    monkeypatch.setenv("EMPTY", " ")
    for source in ("EMPTY", str(tmp_path / "none")):
        with pytest.raises(UserError, match=f"--password {source}"):
            read_password(source)


def test_only_the_right_name_and_password_log_in():
    is_right = login("søster")
    assert is_right(USER, "søster")
    for user, password in ((USER, ""), (USER, "søster "), ("", "søster"), ("admin", "søster"), ("mochi\0s", "øster")):
        assert not is_right(user, password)


# --- the command --------------------------------------------------------------------------------------------------------


def test_a_start_that_cannot_work_is_refused_before_the_models_are_loaded(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_text", None)  # calling it would fail
    for more, expected in (
        (["--host=0.0.0.0"], "--open-to-anyone"),
        (["--password=NOT_THERE"], "neither an environment variable nor"),
        (["--adapter=nowhere.safetensors"], "nowhere.safetensors: no such adapter file"),
        (["--cpu-offload", "--encode.text_precision=int8"], "encode.text_precision int8"),
        (["--host=999.1.1.1", "--open-to-anyone"], "cannot be listened on"),
    ):
        assert main(["demo", *words, *more]) == 1, more
        assert expected in " ".join(capsys.readouterr().err.split())
    assert main(["demo", *words, "--port=70000"]) == 2


def test_without_gradio_the_extra_is_named(words, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _name: None)
    assert main(["demo", *words]) == 1
    assert install_command("demo") in " ".join(capsys.readouterr().err.split())


def test_only_the_page_and_its_server_need_the_extra():
    found = set()
    for path in (ROOT / "mochi_lora").rglob("*.py"):
        if re.search(r"^\s*(import|from) (gradio|fastapi|uvicorn)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.add(path.stem)
    assert found == {"page", "serve"}


def test_adapters_asked_for_are_on_and_those_of_the_run_are_offered(words, adapters, tmp_path):
    config = load_config(Path(words[0].partition("=")[2]), [*words[1:], f"--run.folder={tmp_path}", "--sample.strength=0.5"])
    assert demo._adapters(config, []) == []
    own = [tmp_path / "adapter.safetensors", tmp_path / "adapters" / "best.safetensors"]
    own += [tmp_path / "adapters" / f"step-{step:06d}.safetensors" for step in (20, 10)]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = demo._adapters(config, [])
    assert [(label, on) for label, _, on in found] == [
        ("adapter", True),
        ("best", False),
        ("step-000020", False),
        ("step-000010", False),
    ]
    assert {choice.strength for _, choice, _ in found} == {0.5}
    asked = [AdapterChoice(adapters[0], 0.3), AdapterChoice(own[1], 0.7)]
    found = demo._adapters(config, asked)
    assert [(label, on) for label, _, on in found][:3] == [("style", True), ("best", True), ("adapter", False)]
    assert len(found) == 5


def test_the_words_of_the_command_line_become_the_request(words, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run", lambda config, request: seen.update(config=config, request=request))
    plain = [part for word in words for part in word.split("=", 1)]
    assert main(["demo", *plain, "--adapter", "a.safetensors:0.5", "--cpu-offload", "--port", "0"]) == 0
    assert seen["config"].engine.cpu_offload is True
    request = seen["request"]
    assert request == DemoRequest(
        port=0,
        adapters=(AdapterChoice(Path("a.safetensors"), 0.5),),
        started_with=(*words[:1], *words[1:], "--engine.cpu_offload=true"),
    )
