"""House rules that can be read from the sources: the order of stages, sizes, and settings nobody reads."""

import ast
import re
import statistics
import tomllib
from functools import cache
from pathlib import Path

import pytest

from mochi_lora.config.schema import Config

ROOT = Path(__file__).parents[1]
# A room imports only from its own stage and from earlier ones.
STAGES = (
    "errors",
    "spec",
    "streams",
    "files",
    "console",
    "config",
    "data",
    "parallel",
    "engine",
    "planning",
    "model",
    "interop",
    "training",
    "inference",
)
STAGES += ("tiny", "measures", "curation", "evaluation", "report", "demo", "runs", "commands")
STAGES += ("cli_adapters", "cli_demo", "cli", "__main__")
TORCH_FREE = ("errors", "spec", "streams", "files", "console", "config", "cli_adapters", "cli_demo", "cli", "__main__")
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "wandb", "av", "decord", "bitsandbytes"}
HEAVY |= {"gradio", "fastapi", "uvicorn"}
# The one broad `except`: a clip that fails never stops the others.
BROAD_EXCEPTS = {"mochi_lora/data/encode.py": 1}


@cache
def sources() -> dict[str, ast.Module]:
    """Module name -> syntax tree, for the whole package."""
    found = {}
    for path in sorted((ROOT / "mochi_lora").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    assert len(found) > 15
    return found


def imported(tree: ast.AST) -> set[str]:
    """Full names of everything imported below `tree`; for `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own(names: set[str]) -> set[str]:
    return {name for name in names if name in sources() and name != "mochi_lora"}


def stage(module: str) -> str:
    return module.split(".")[1]


def rooms() -> dict[str, ast.Module]:
    return {name: tree for name, tree in sources().items() if name != "mochi_lora"}


def test_every_room_belongs_to_a_stage():
    assert {stage(name) for name in rooms()} <= set(STAGES)


def test_no_room_imports_from_a_later_stage():
    steps_back = [
        f"{name} imports {other}"
        for name, tree in rooms().items()
        for other in own(imported(tree))
        if STAGES.index(stage(other)) > STAGES.index(stage(name))
    ]
    assert steps_back == []


def test_rooms_do_not_import_each_other_in_circles():
    graph = {name: own(imported(tree)) - {name} for name, tree in rooms().items()}
    while leaves := {name for name, others in graph.items() if not others & set(graph)}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert graph == {}


def test_data_knows_no_model():
    known = {other for name, tree in rooms().items() if stage(name) == "data" for other in imported(tree)}
    assert not {"diffusers", "transformers", "peft"} & {name.split(".")[0] for name in known}


def test_training_knows_no_pipeline_no_encoder_and_no_tracker_by_name():
    forbidden = {"diffusers", "transformers", "wandb", "trackio", "tensorboard", "av", "decord"}
    for name, tree in rooms().items():
        if stage(name) != "training":
            continue
        allowed = {"wandb", "trackio", "tensorboard"} if name.startswith("mochi_lora.training.track") else set()
        known = imported(tree)
        assert not ({other.split(".")[0] for other in known} & forbidden) - allowed, name
        assert not known & {"mochi_lora.model.vae", "mochi_lora.model.text"}, name


def test_what_help_imports_is_free_of_torch():
    top_level = {name: {other for node in tree.body for other in imported_by(node)} for name, tree in sources().items()}
    reached, waiting = set(), {name for name in rooms() if stage(name) in TORCH_FREE}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= own(top_level[name]) - reached
    assert {"mochi_lora.cli", "mochi_lora.config.schema"} <= reached
    heavy = {(name, other) for name in reached for other in top_level[name] if other.split(".")[0] in HEAVY}
    assert heavy == set()


def imported_by(node: ast.stmt) -> set[str]:
    return imported(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else set()


def test_every_setting_is_read_somewhere():
    """A setting that does nothing is a lie. `config.train.steps`, `train.steps` and `settings.steps` count, the last
    where `settings` is annotated with, or assigned from, the section."""
    read = {pair for name, tree in rooms().items() if stage(name) != "config" for pair in settings_read(tree)}
    unread = [
        f"{section}.{name}"
        for section, owner in Config.model_fields.items()
        for name in owner.annotation.model_fields
        if (section, name) not in read
    ]
    assert unread == []


def settings_read(tree: ast.Module) -> set[tuple[str, str]]:
    by_class = {owner.annotation.__name__: section for section, owner in Config.model_fields.items()}
    aliases: dict[str, set[str]] = {section: {section} for section in Config.model_fields}
    for node in ast.walk(tree):
        match node:
            case (
                ast.arg(arg=name, annotation=ast.Name(id=kind))
                | ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name), annotation=ast.Name(id=kind))
            ) if kind in by_class:
                aliases.setdefault(name, set()).add(by_class[kind])
            case ast.Assign(targets=[ast.Name(id=name) | ast.Attribute(attr=name)], value=ast.Attribute(attr=section)) if (
                section in Config.model_fields
            ):
                aliases.setdefault(name, set()).add(section)
    pairs = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=name):
                known = aliases.get(owner) or aliases.get(owner.strip("_")) or set()
                pairs |= {(section, name) for section in known}
    return pairs


def test_the_search_for_read_settings_finds_what_it_should():
    tree = ast.parse(
        "def f(settings: TrainConfig, x: int):\n    settings.steps; x.seed; self._adapter.rank\n    e = c.engine\n    e.device"
    )
    assert settings_read(tree) >= {("train", "steps"), ("adapter", "rank"), ("engine", "device")}
    assert ("run", "seed") not in settings_read(tree)


# --- sizes and habits ---------------------------------------------------------------------------------------------------


def program_files() -> list[Path]:
    found = [*(ROOT / "mochi_lora").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py"), ROOT / "train.py"]
    return [path for path in found if path.name != "__init__.py"]


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in program_files())
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_files_are_short():
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in program_files()}
    assert statistics.median(sizes.values()) <= 200
    assert {name: size for name, size in sizes.items() if size > 450} == {}
    assert sizes["train.py"] <= 40


def test_functions_are_short():
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions())
    assert lengths[int(0.9 * len(lengths))] <= 40
    assert sum(length > 60 for length in lengths) <= 0.04 * len(lengths)


def test_functions_are_annotated():
    bare = []
    for node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = all(argument.annotation for argument in arguments if argument.arg not in ("self", "cls"))
        if not typed or node.returns is None:
            bare.append(node.name)
    assert len(bare) <= 0.05 * len(functions()), bare


def test_there_is_one_broad_except():
    broad: dict[str, int] = {}
    for path in program_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and catches_everything(node.type):
                name = path.relative_to(ROOT).as_posix()
                broad[name] = broad.get(name, 0) + 1
    assert all(count <= BROAD_EXCEPTS.get(name, 0) for name, count in broad.items()), broad


def catches_everything(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(name is None or getattr(name, "id", "") in ("Exception", "BaseException") for name in names)


def test_no_room_is_called_utils():
    assert [path.name for path in program_files() if path.stem in ("utils", "helpers", "common", "misc")] == []


def committed_files() -> list[Path]:
    folders = [ROOT / name for name in (".ci", "benchmarks", "configs", "data_prep", "examples", "mochi_lora", "tests")]
    inside = [path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return inside + [path for path in ROOT.iterdir() if path.is_file()]


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(r"(?<![\w.])/(?:work|root|home|opt)/", id="machine paths"),
        pytest.param(r"\.\./shared", id="folders beside the checkout"),
        pytest.param(r"pypi\.org|python[h]osted|[-]-(?:extra-)?index-url", id="package registries"),
    ],
)
def test_no_file_names_the_machine_it_was_written_on(trace):
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # footage, tensors
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in re.finditer(trace, text)]
    assert found == []


def test_the_security_page_names_every_pickle_that_is_opened():
    opening = {
        path.relative_to(ROOT).as_posix() for path in program_files() if "torch.load(" in path.read_text(encoding="utf-8")
    }
    rooms = ("training/checkpoint.py", "tiny/stage.py", "measures/builtin_encoders.py")
    assert opening == {f"mochi_lora/{room}" for room in rooms}
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in opening)
    assert "nothing is unpickled" not in text.lower()
    (line,) = [line for line in text.splitlines() if line.startswith("| checkpoints |")]
    assert "`optimizer.pt`" in line
    assert "`torch.load(weights_only=True)`" in line


def test_types_are_checked_everywhere_but_in_the_tests():
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["files"]
    committed = {path.relative_to(ROOT).parts[0] for path in committed_files() if path.suffix == ".py"}
    assert committed - {"tests"} == set(checked)


def test_nothing_is_unpickled_or_evaluated():
    for path in program_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "eval",
                "exec",
            ):
                safe = any(word.arg == "weights_only" and getattr(word.value, "value", None) is True for word in node.keywords)
                assert safe, f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}"
