"""The command line: what each command hands over, exit statuses, and that help stays free of torch."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mochi_lora import cli
from mochi_lora.cli import main, split_overrides
from mochi_lora.config.requests import AdapterChoice, SampleRequest, read_prompt_lines, read_prompts
from mochi_lora.config.schema import Config
from mochi_lora.errors import UserError
from mochi_lora.runs.called import Called

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "wandb", "av", "decord")


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text("run: {folder: runs/some}\ntrain: {steps: 300}\n")
    return "some.yaml"


@pytest.fixture
def command(monkeypatch):
    """Replaces one command module and records how it is called."""

    def replace(name, answer=None):
        calls = []

        def run(*given, **named):
            calls.append((given, named))
            if answer is not None:
                raise answer

        module = types.ModuleType(f"mochi_lora.commands.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(f"mochi_lora.commands.{name}", module, raising=False)
        return calls

    return replace


def test_encode_hands_over_the_resolved_configuration(command, config_file):
    calls = command("encode")
    assert main(["encode", "--config", config_file, "--data.clips", "films", "--train.steps=400"]) == 0
    ((config,), named) = calls[0]
    assert isinstance(config, Config)
    assert (config.run.folder, config.data.clips, config.train.steps) == (Path("runs/some"), Path("films"), 400)
    assert named == {"called": Called("some.yaml", ("--data.clips", "films", "--train.steps=400"))}


def test_train_continues_unless_told_to_start_over(command, config_file):
    calls = command("train")
    assert main(["train", "--config", config_file]) == 0
    assert main(["train", "--train.steps", "400", "--fresh", "--config", config_file]) == 0
    assert [named for _, named in calls] == [
        {"fresh": False, "push": None, "called": Called("some.yaml")},
        {"fresh": True, "push": None, "called": Called("some.yaml", ("--train.steps", "400"))},
    ]
    assert [given[0].train.steps for given, _ in calls] == [300, 400]


def test_sample_hands_over_prompts_adapters_and_seeds(command, config_file):
    calls = command("sample")
    words = [
        "--prompt",
        "a fox",
        "--sample.steps",
        "8",
        "--prompt",
        "a boat",
        "--adapter",
        "a.safetensors",
        "b:c.safetensors:0.5",
    ]
    assert (
        main(["sample", "--config", config_file, *words, "--seed", "3", "4", "--output", "out", "--assume-alpha", "rank"]) == 0
    )
    config, request = calls[0][0]
    assert config.sample.steps == 8
    assert request == SampleRequest(
        prompts=("a fox", "a boat"),
        adapters=(AdapterChoice(Path("a.safetensors")), AdapterChoice(Path("b:c.safetensors"), 0.5)),
        seeds=(3, 4),
        output=Path("out"),
        assume_alpha_is_rank=True,
    )


def test_sample_reads_a_prompts_file(command, config_file, tmp_path):
    calls = command("sample")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a fox", "seed": 9}\n\n{"prompt": "a boat"}\n')
    assert main(["sample", "--config", config_file, "--prompts", "prompts.jsonl", "--seed", "1", "2", "--base-only"]) == 0
    request = calls[0][0][1]
    assert request.base_only
    assert request.videos(["unused"], [5]) == [("a fox", 9), ("a boat", 1), ("a boat", 2)]


def test_sample_hands_over_a_sweep(command, config_file):
    calls = command("sample")
    words = ["--adapter", "a", "b", "--sweep", "--strengths", "0", ".5", "-1", "--grid", "--prompt", "a fox"]
    assert main(["sample", "--config", config_file, *words]) == 0
    request = calls[0][0][1]
    assert (request.strengths, request.sweep, request.grid) == ((0.0, 0.5, -1.0), True, True)
    columns = request.columns(request.adapters)
    assert [[(str(item.path), item.strength) for item in column] for column in columns] == [
        [(name, strength)] for name in ("a", "b") for strength in (0.0, 0.5, -1.0)
    ]


def test_without_a_sweep_adapters_stay_together_at_each_strength():
    a, b = AdapterChoice(Path("a")), AdapterChoice(Path("b"))
    assert SampleRequest().columns([a, b]) == [(a, b)]
    half = (AdapterChoice(Path("a"), 0.5), AdapterChoice(Path("b"), 0.5))
    assert SampleRequest(strengths=(0.5, 1)).columns([a, b]) == [half, (a, b)]
    assert SampleRequest().columns([]) == [()]


def test_the_prompts_file_of_an_evaluation_is_one_for_sample(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "set": "unrelated"}\n{"prompt": "y", "seed": 3}\n')
    assert read_prompts(path) == (("x", "y"), (None, 3))
    assert [line.prompt_set for line in read_prompt_lines(path)] == ["unrelated", None]


def test_inspect_and_tiny_hand_over_their_options(command, config_file):
    inspected, built = command("inspect"), command("tiny")
    assert main(["inspect", "--config", config_file, "--decode", "2", "--output", "out"]) == 0
    assert main(["tiny", "some/folder", "--random", "7"]) == 0
    assert inspected[0][1] == {"decode": 2, "output": Path("out")}
    assert built == [((Path("some/folder"),), {"random": 7})]


def test_an_error_for_people_is_one_line_on_stderr_and_status_1(command, config_file, capsys):
    command("encode", answer=UserError("clip.mp4: [bold] is broken"))
    assert main(["encode", "--config", config_file]) == 1
    told = capsys.readouterr()
    assert told.err == "error: clip.mp4: [bold] is broken\n"
    assert told.out == ""


def test_a_broken_invariant_keeps_its_traceback(command, config_file):
    command("encode", answer=AssertionError("ours"))
    with pytest.raises(AssertionError):
        main(["encode", "--config", config_file])


def test_an_interrupt_is_status_130(command, config_file):
    command("train", answer=KeyboardInterrupt())
    assert main(["train", "--config", config_file]) == 130


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--config", "some.yaml", "--train.stpes", "4"], "did you mean 'steps'?"),
        (["train", "--config", "nowhere.yaml"], "tried nowhere.yaml and configs/nowhere.yaml"),
        (["train", "--config", "some.yaml", "--steps", "4"], "did you mean '--train.steps' or '--sample.steps'?"),
        (["train", "--config", "some.yaml", "--learning_rte", "4"], "did you mean '--train.learning_rate'?"),
        (["train", "--config", "some.yaml", "--train.steps", "--fresh"], "no value; write --train.steps VALUE"),
        (["train", "--confi", "some.yaml"], "--config"),
        (["train"], "--config"),
        ([], "COMMAND"),
        (["trian"], "trian"),
        (["tiny", "folder", "--train.steps", "4"], "tiny takes no settings"),
        (["tiny", "folder", "--random", "-1"], "-1"),
        (["sample", "--config", "some.yaml", "--prompt", "x", "--prompts", "y.txt"], "not allowed with"),
        (["sample", "--config", "some.yaml", "--adapter", "x", "--base-only"], "not allowed with"),
        (["sample", "--config", "some.yaml", "--assume-alpha", "8"], "rank"),
        (["sample", "--config", "some.yaml", "--strengths", "nan"], "finite"),
        (["config", "schema", "--config", "some.yaml"], "does not depend on --config"),
    ],
)
def test_a_wrong_command_line_or_configuration_is_status_2(command, config_file, capsys, words, told):
    calls = [command(name) for name in ("train", "sample", "tiny")]
    assert main(words) == 2
    assert told in capsys.readouterr().err
    assert calls == [[], [], []]


def test_overrides_and_options_may_stand_in_any_order():
    argv = ["train", "--a.b", "1", "--config", "x", "--c.d=2 3", "--fresh", "--e.f", "-4", "--g.h"]
    assert split_overrides(argv) == (["train", "--config", "x", "--fresh"], ["--a.b", "1", "--c.d=2 3", "--e.f", "-4", "--g.h"])


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("runs/x:y/a.safetensors", "runs/x:y/a.safetensors", 1.0),
        ("a:-1", "a", -1.0),
    ],
)
def test_a_number_after_the_last_colon_is_the_strength(text, path, strength):
    assert AdapterChoice.parse(text) == AdapterChoice(Path(path), strength)


@pytest.mark.parametrize("text", ["a.safetensors:nan", "a.safetensors:inf", ":0.5"])
def test_an_adapter_without_path_or_finite_strength_is_refused(text):
    with pytest.raises(UserError, match="PATH:STRENGTH"):
        AdapterChoice.parse(text)


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa fox\n\n  ein Schiff, größer  \n", encoding="utf-8")
    assert read_prompts(path) == (("a fox", "ein Schiff, größer"), (None, None))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', r"p\.jsonl, line 2: no prompt"),
        ("p.jsonl", b'{"prompt": "x", "steps": 3}\n', r"line 1: unknown key 'steps'"),
        ("p.jsonl", b'{"prompt": "x", "seed": true}\n', r"line 1: seed True"),
        ("p.jsonl", b'{"prompt": "x", "set": "plain"}\n', r"line 1: set 'plain': expected 'trigger' or 'unrelated'"),
        ("p.jsonl", b'{"prompt": "x"\n', r"line 1: not JSON"),
        ("p.txt", b"\n \n", r"p\.txt: the prompts file holds no prompt"),
        ("p.txt", b"caf\xe9\n", r"p\.txt: the prompts file is not UTF-8"),
        ("absent.txt", None, r"absent\.txt: the prompts file cannot be read"),
    ],
)
def test_a_wrong_prompts_file_is_refused_by_name_and_line(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_prompts(tmp_path / name)


def test_a_request_without_prompts_or_seeds_takes_the_configurations():
    assert SampleRequest().videos(["a", "b"], [1, 2]) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert SampleRequest(prompts=("c",)).videos(["a"], [1]) == [("c", 1)]


def test_config_prints_reference_schema_and_resolved_file(config_file, capsys):
    assert main(["config", "reference"]) == 0
    assert "\n  learning_rate: 0.0001\n" in capsys.readouterr().out
    assert main(["config", "schema"]) == 0
    assert "train" in json.loads(capsys.readouterr().out)["properties"]
    assert main(["config", "show", "--config", config_file, "--adapter.rank", "4"]) == 0
    shown = capsys.readouterr().out
    assert "  rank: 4\n" in shown
    assert "  steps: 300\n" in shown


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["sample", "--help"], ["config", "reference"], ["config", "show"], ["--version"]]
)
def test_help_and_configuration_import_nothing_heavy(words):
    code = (
        "import sys; from mochi_lora.cli import main; status = main(sys.argv[1:]); print(sorted(sys.modules)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stdout.rpartition("[")[2]
    assert "'mochi_lora.cli'" in loaded
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


@pytest.mark.parametrize(
    "words", [["-m", "mochi_lora", "train"], ["train.py"], ["-m", "mochi_lora", "encode"], ["data_prep/encode_clips.py"]]
)
def test_the_scripts_are_the_commands(words):
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *words, "--config", "quickstart.yaml", "--train.stpes=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 2
    assert "train.stpes: unknown key; did you mean 'steps'? (command line)" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_cache_is_the_inspect_command():
    done = subprocess.run(
        [sys.executable, "data_prep/inspect_cache.py", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0
    assert "--decode" in done.stdout


def test_every_command_is_in_the_help(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("encode", "train", "sample", "inspect", "tiny", "draw", "config"))
    assert callable(cli.entry)
