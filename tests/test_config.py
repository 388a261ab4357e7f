"""Configuration: what is refused and how it is said; the annotated reference and the recipes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mochi_lora.config.load import dump_config, find_config, load_config
from mochi_lora.config.problems import ConfigError
from mochi_lora.config.reference import json_schema, reference_yaml
from mochi_lora.config.schedule import linear_quadratic_schedule
from mochi_lora.config.schema import Config, SampleConfig
from mochi_lora.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = [
    (section, name, field)
    for section, owner in Config.model_fields.items()
    for name, field in owner.annotation.model_fields.items()
]


def written(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_no_file_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    assert load_config(None, []) == Config()
    assert load_config(written(tmp_path, ""), []) == Config()
    assert load_config(written(tmp_path, "# only words\n"), []) == Config()
    assert load_config(written(tmp_path, "train:\n"), []) == Config()


def test_a_learning_rate_without_a_dot_is_a_number(tmp_path):
    assert yaml.safe_load("1e-4") == "1e-4"  # the trap: YAML 1.1 wants 1.0e-4
    assert load_config(written(tmp_path, "train: {learning_rate: 2e-5}"), []).train.learning_rate == 2e-5
    assert load_config(None, ["--train.learning_rate", "3e-5"]).train.learning_rate == 3e-5


def test_overrides_beat_the_file_and_the_last_one_wins(tmp_path):
    path = written(tmp_path, "adapter: {rank: 4, alpha: 2}")
    config = load_config(
        path, ["--adapter.rank", "6", "--adapter.rank=16", "--sample.seeds=[1, 2]", "--sample.strength", "-0.5"]
    )
    assert (config.adapter.rank, config.adapter.alpha) == (16, 2.0)
    assert config.sample.seeds == [1, 2]
    assert config.sample.strength == -0.5


def test_text_settings_take_what_was_typed():
    """YAML alone would read a date, a number, a mapping and a boolean."""
    overrides = [
        "--run.folder",
        "2026-01-02",
        "--model.revision=0123",
        "--sample.negative_prompt",
        "a: b",
        "--tracking.run_name",
        "no",
    ]
    config = load_config(None, overrides)
    assert config.run.folder == Path("2026-01-02")
    assert config.model.revision == "0123"
    assert config.sample.negative_prompt == "a: b"
    assert config.tracking.run_name == "no"
    assert load_config(None, ["--model.revision", "null"]).model.revision is None


def test_all_problems_of_file_and_command_line_come_at_once_with_their_origin(tmp_path):
    path = written(
        tmp_path,
        "adapter: {rnak: 4, dropout: many}\nsample: {frames: 84, width: 850}\n"
        "data: {buckets: [36x480x848]}\nengine: {device: tpu}",
    )
    told = refusal(path, "--train.stpes", "5", "--train.batch_size=0", "--objective.sigma", "normal")
    lines = told.splitlines()
    assert lines[0] == "the configuration has 9 problems:"
    file = f"({path})"
    assert f"  adapter.rnak: unknown key; did you mean 'rank'? {file}" in lines
    assert f"  adapter.dropout: got 'many', expected a valid number {file}" in lines
    assert f"  sample.frames: 84 frames: Mochi takes 6k+1 frames, use 79 or 85 {file}" in lines
    assert any(line.startswith("  sample.width:") and "use 848 or 864" in line for line in lines)
    assert any(line.startswith("  data.buckets[0]:") and "use 31 or 37" in line for line in lines)
    assert f"  engine.device: got 'tpu', expected 'auto', 'cuda' or 'cpu' {file}" in lines
    assert "  train.stpes: unknown key; did you mean 'steps'? (command line)" in lines
    assert "  train.batch_size: got 0, expected greater than or equal to 1 (command line)" in lines
    assert "  objective.sigma: got 'normal', expected 'uniform', 'logit_normal' or 'stratified' (command line)" in lines


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--rank.x=1", "unknown section 'rank'"),
        ("--trian.steps=1", "did you mean 'train.steps' or 'sample.steps'?"),
        ("--train.rank=1", "unknown key; did you mean 'adapter.rank'?"),
        ("--train.steps", "no value; write --train.steps VALUE"),
        ("--train.steps.deep=1", "unknown key"),
        ("--sample.seeds=1", "got 1, expected a list, for instance [1]"),
        ("--sample.seeds=[1", "not a YAML value"),
        ("--train.steps=2.5", "train.steps: got 2.5, expected a valid integer"),
        ("--adapter.rank=true", "adapter.rank: got true"),
        ("--adapter.dora=perhaps", "adapter.dora: got 'perhaps', expected a valid boolean"),
        ("--train.betas=[0.9]", "train.betas[1]: got [0.9], expected one value more"),
        ("--train.betas=[0.9, 1]", "train.betas[1]: got 1, expected less than 1"),
        ("--train.betas=[-0.1, 0.999]", "train.betas[0]: got -0.1, expected greater than or equal to 0"),
        ("--sample.guidance=much", "sample.guidance: got 'much', expected a valid number or a list"),
        ("--sample.guidance=[6, 5]", "sample.guidance: guidance has 2 values for 64 steps"),
        ("--sample.linear_steps=64", "sample.linear_steps: linear_steps 64 of 64 steps: take at least 1 and fewer"),
        ("--sample.threshold_noise=0.9", "sample.threshold_noise: threshold_noise 0.9 with 32 linear steps of 64: sigma does"),
        ("--sample.threshold_noise=1e-17", "sample.threshold_noise: threshold_noise 1e-17 with 32 linear steps of 64"),
        ("--train.warmup_steps=1000", "warmup_steps 1000 must be smaller than steps 1000"),
        ("--model.revision=!!python/name:os.system", None),
    ],
)
def test_a_wrong_override_is_told(override, told):
    if told is None:  # text is never parsed, so a tag in it is only text
        assert load_config(None, [override]).model.revision == "!!python/name:os.system"
        return
    message = refusal(None, override)
    assert told in message
    assert message.startswith("the configuration has a problem:")
    assert "(command line)" in message or "(defaults, command line)" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {steps: 5, steps: 6}", "train.steps: written twice, in lines 1 and 1; keep one"),
        ("train: {steps: 500}\nmodel: {}\ntrain: {batch_size: 2}", "train: written twice, in lines 1 and 3"),
        ("train: !!python/object/apply:os.system ['true']", "plain YAML only, without tags"),
        ("- train\n- steps", "got a list, expected sections"),
        ("just words", "got a str, expected sections"),
        ("train:\n\tsteps: 5", "line 2, column 1: not valid YAML"),
        ("train: [1", "not valid YAML"),
        ("train: 5", "train: got 5, expected settings below it, indented"),
        ("rank: 4", "rank: unknown section; did you mean 'adapter.rank'?"),
        ("tracking: {trackers: [wandbb]}", "tracking.trackers[0]: got 'wandbb', expected 'wandb', 'trackio' or 'tensorboard'"),
        ("model: {revision: 12}", "model.revision: got 12, expected text (in a file, put it in quotes)"),
        ("run: {folder: 2026-01-02}", "put it in quotes"),
        ("a: &x {b: *x}", "a: unknown section"),
    ],
)
def test_a_wrong_file_is_told_with_its_name(tmp_path, text, told):
    path = written(tmp_path, text)
    message = refusal(path)
    assert told in message
    assert str(path) in message


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {folder: caf\xe9}".encode("latin-1"))
    assert f"{path}: is not UTF-8 text" in refusal(path)


def test_a_configuration_is_found_as_given_then_under_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    inside = written(tmp_path / "configs", "")
    assert find_config("some.yaml") == Path("configs/some.yaml")
    assert find_config(str(inside)) == inside
    written(tmp_path, "")
    assert find_config("some.yaml") == Path("some.yaml")


def test_a_configuration_that_is_nowhere_is_told_with_both_paths_and_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"tried style.yaml and configs/style.yaml$"):
        find_config("style.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "style.yaml").touch()
    (tmp_path / "configs" / "motion.yaml").touch()
    with pytest.raises(ConfigError, match=r"tried stlye.yaml and configs/stlye.yaml; there is style.yaml$"):
        find_config("stlye.yaml")


def test_what_is_dumped_loads_to_the_same_configuration(tmp_path):
    config = load_config(
        None,
        ["--train.epsilon=1e-9", "--sample.prompts=['été: \"x\"', '#2']", "--sample.guidance=[5.5, 4]", "--sample.steps=2"],
    )
    assert load_config(written(tmp_path, dump_config(config)), []) == config


def above(lines: list[str], line: str, start: int) -> tuple[str, int]:
    """The comment block straight above the first line that starts with `line`, as one text, and where the line is."""
    at = next(i for i in range(start, len(lines)) if lines[i].startswith(line))
    first = at
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(text.strip().lstrip("#").strip() for text in lines[first:at]), at


@pytest.mark.parametrize("source", ["file", "generated"])
def test_the_reference_lists_every_setting_with_its_default_below_its_sentence(source):
    text = (CONFIGS / "style.yaml").read_text(encoding="utf-8") if source == "file" else reference_yaml()
    content = yaml.safe_load(text)
    assert {(section, name) for section, names in content.items() for name in names} == {(s, n) for s, n, _ in SETTINGS}
    assert Config.model_validate(content) == Config()
    lines = text.splitlines()
    at, last_section = 0, ""
    for section, name, field in SETTINGS:
        if section != last_section:
            at, last_section = lines.index(f"{section}:"), section
        comment, at = above(lines, f"  {name}:", at)
        assert " ".join(field.description.split()) in comment, f"{section}.{name}"


def test_both_references_open_with_the_same_words():
    by_hand, generated = (CONFIGS / "style.yaml").read_text(encoding="utf-8"), reference_yaml()
    assert by_hand.splitlines()[:2] == generated.splitlines()[:2]


@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize("linear_steps", [None, 1, 2, 6])
@pytest.mark.parametrize("threshold_noise", [0.001, 0.2, 0.5, 0.75, 0.99])
def test_what_loads_is_what_the_sampler_takes(steps, linear_steps, threshold_noise):
    settings = {"steps": steps, "linear_steps": linear_steps, "threshold_noise": threshold_noise}
    try:
        linear_quadratic_schedule(steps, threshold_noise, linear_steps)
    except UserError as refused:
        with pytest.raises(ValidationError, match=re.escape(str(refused))):
            SampleConfig(**settings)
    else:
        assert SampleConfig(**settings).linear_steps == linear_steps


def test_a_preset_stands_for_its_keys_and_refuses_others_beside_it():
    fast = SampleConfig(preset="fastmochi")
    assert (fast.steps, fast.guidance, fast.linear_steps, fast.threshold_noise) == (8, 1.5, 6, 0.1)
    assert SampleConfig.model_validate(fast.model_dump()) == fast
    with pytest.raises(ValidationError, match=r"preset fastmochi has steps 8, but 64 is set: leave one of them out"):
        SampleConfig(preset="fastmochi", steps=64)
    with pytest.raises(ValidationError, match="fastmochi"):
        SampleConfig(preset="slowmochi")


def test_a_guidance_interval_goes_up():
    with pytest.raises(ValidationError, match=r"guidance_interval \[0.8, 0.2\]: give the lowest sigma first"):
        SampleConfig(guidance_interval=(0.8, 0.2))


def test_every_setting_has_a_sentence():
    assert len(SETTINGS) > 50
    assert not [f"{section}.{name}" for section, name, field in SETTINGS if not (field.description or "").endswith(".")]


def test_the_json_schema_refuses_unknown_keys_and_knows_every_setting():
    schema = json.loads(json.dumps(json_schema()))
    for section, name, _ in SETTINGS:
        owner = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
        assert owner["additionalProperties"] is False
        assert owner["properties"][name]["description"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_loads_and_stays_within_what_the_field_uses(path):
    config = load_config(path, [])
    assert 4 <= config.adapter.rank <= 16
    assert config.adapter.alpha == config.adapter.rank
    # mochi-tiny is small, and its recipes are short: not what the field trains.
    assert 1e-5 <= config.train.learning_rate <= (2e-3 if path.stem.startswith("quickstart") else 2e-4)
    buckets_frames = {int(bucket.split("x")[0]) for bucket in config.data.buckets}
    assert config.sample.frames in buckets_frames


@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "style.yaml"}), ids=lambda path: path.stem)
def test_a_recipe_holds_a_reason_and_few_settings_that_are_defaults(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    defaults = Config().model_dump(mode="json")
    resolved = load_config(path, []).model_dump(mode="json")
    content = yaml.safe_load(text)
    same = [f"{s}.{n}" for s, names in content.items() for n in names if resolved[s][n] == defaults[s][n]]
    # Said although it is the default, because the recipe is about it.
    assert set(same) <= {
        "adapter.rank",
        "adapter.alpha",
        "train.batch_size",
        "train.learning_rate",
        "train.steps",
        "engine.plan",
    }


def test_the_recipes_are_all_there():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"style", "motion", "character", "low_memory", "quickstart"}
