"""The wheel: it holds the package, installs into a clean environment, and works there without the checkout."""

import ast
import email
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mochi_lora import errors

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Name to install -> name to import, where they differ.
IMPORTS = {
    "decord2": "decord",
    "pillow": "PIL",
    "scenedetect-headless": "scenedetect",
    "opencv-python-headless": "cv2",
    "pyyaml": "yaml",
    "protobuf": "google.protobuf",
}
# A module that the others do without -> what it imports: torch's CUDA builds bring the version that fits, its CPU builds none.
TAKEN_IF_THERE = {"mochi_lora.engine.fused": "triton"}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[tuple[str, str]]:
    """(name, lowest version) of everything pyproject.toml asks for, extras too."""
    asked = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    found = [Requirement(text) for text in asked if not text.startswith("mochi-lora[")]
    assert all({bound.operator for bound in each.specifier} <= {">=", "<"} for each in found)
    floors = [[bound.version for bound in each.specifier if bound.operator == ">="] for each in found]
    return [(canonicalize_name(each.name), floor[0] if floor else "0") for each, floor in zip(found, floors, strict=True)]


@pytest.mark.parametrize(
    ("checkout", "expected"),
    [
        (True, ["pip install -e .", "pip install -e '.[demo]'"]),
        (False, ["pip install --upgrade mochi-lora", "pip install 'mochi-lora[demo]'"]),
    ],
)
def test_what_a_message_says_to_install_is_the_checkout_where_there_is_one(tmp_path, monkeypatch, checkout, expected):
    """A wheel has no pyproject.toml beside the package."""
    if not checkout:
        monkeypatch.setattr(errors, "_CHECKOUT", tmp_path / "pyproject.toml")
    assert [errors.install_command(), errors.install_command("demo")] == expected


def test_every_extra_that_a_message_names_is_one_of_the_project():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mochi_lora").rglob("*.py"))
    named = set(re.findall(r"""install_command\(["']([\w-]+)["']\)""", text))
    assert {"demo", "flash4", "eval-builtin", "trackio", "tensorboard"} <= named <= set(PROJECT["optional-dependencies"])


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_every_requirement_is_pinned_at_or_above_its_floor():
    pins = pinned()
    for name, floor in requirements():
        assert name in pins, f"{name} is not in constraints.txt"
        assert as_numbers(pins[name]) >= as_numbers(floor), name


def test_every_floor_is_the_lowest_version_the_project_was_run_with():
    """Of the GPU machine only what is lower than the pin; benchmarks/results holds its torch, diffusers and peft."""
    run = {name: {Version(version)} for name, version in pinned().items()}
    for name, version in {"torch": "2.11.0", "transformers": "5.17.0", "huggingface-hub": "1.33.0"}.items():
        run[name].add(Version(version))
    floors = {name: Version(floor) for name, floor in requirements() if name != "setuptools"}  # 77: the first with PEP 639
    assert {name: str(floor) for name, floor in floors.items() if floor != min(run[name])} == {}


def test_every_pin_is_one_exact_public_version():
    assert pinned()["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9a-z.]+", version) for version in pinned().values())


def test_what_does_not_import_beside_a_cpu_torch_is_never_asked_for():
    asked = {name for name, _ in requirements()} | set(pinned())
    assert not asked & {"torchvision", "torchcodec", "torchaudio"}


def test_every_pip_call_of_the_makefile_is_constrained():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    calls = [line for line in text.splitlines() if re.search(r"\bpip\b", line) and not line.startswith("#")]
    assert [line for line in calls if "pip install" in line and "-c constraints.txt" not in line and "@echo" not in line] == []
    assert f"torch=={pinned()['torch']}" in text


def test_everything_imported_is_asked_for():
    """A package that only comes along with another can go with it."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "mochi_lora").rglob("*.py")]
    imports = {alias.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    asked = {IMPORTS.get(name, name.replace("-", "_")).split(".")[0] for name, _ in requirements()}
    known = asked | {*TAKEN_IF_THERE.values()} | {"mochi_lora"}
    assert {name.split(".")[0] for name in imports} - known <= sys.stdlib_module_names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "mochi_lora", source / "mochi_lora", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True)
    (built,) = folder.glob("mochi_lora-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """Interpreter of a new environment that holds the wheel, and sees the dependencies of this one but not its checkout."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    assert site.is_dir()
    subprocess.run(
        [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
        check=True,
    )
    # A path line only makes the folder importable; .pth files inside it (an editable install's) are not followed.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = [path for path in (ROOT / "mochi_lora").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT).as_posix() for path in inside}
    assert {"mochi_lora/py.typed", "mochi_lora/report/templates/page.html"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


@pytest.mark.slow
def test_the_pins_satisfy_what_the_wheel_asks_for(wheel):
    """From the metadata users' pip will read, not from pyproject.toml."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert Version(sys.version.split()[0]) in SpecifierSet(metadata["Requires-Python"])
    assert set(metadata.get_all("Provides-Extra")) == {"demo", "eval-builtin", "flash4", "tensorboard", "trackio", "test"}
    asked = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert len(asked) > 20
    pins = {**{canonicalize_name(name): version for name, version in pinned().items()}, "mochi-lora": metadata["Version"]}
    refused = [str(need) for need in asked if pins[canonicalize_name(need.name)] not in need.specifier]
    assert refused == []


def resolve(python, wheel, scratch, *arguments):
    """What pip would install for the wheel with its extras, when it may use only what the environment already holds."""
    report = scratch / "report.json"
    options = ["--dry-run", "--no-index", "--report", str(report), *arguments]
    call = [
        sys.executable,
        "-m",
        "pip",
        f"--python={python}",
        "install",
        *options,
        f"{wheel}[eval-builtin,test,tensorboard,trackio]",
    ]
    done = subprocess.run(call, capture_output=True, text=True)
    found = json.loads(report.read_text()) if done.returncode == 0 else {"install": []}
    return done, [entry["metadata"]["name"] for entry in found["install"]]


@pytest.mark.slow
def test_the_installed_versions_resolve_the_wheel_with_its_extras(clean_python, wheel, tmp_path):
    done, new = resolve(clean_python, wheel, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(new) <= {"mochi-lora"}
    (tmp_path / "lower.txt").write_text("pydantic<2\n")
    done, _ = resolve(clean_python, wheel, tmp_path, "-c", str(tmp_path / "lower.txt"))
    assert done.returncode != 0, "pip resolved nothing: this test cannot fail"
    assert "pydantic<2" in done.stdout


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(clean_python, tmp_path):
    program = clean_python.with_name("mochi-lora")
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "sample" in told
    (tmp_path / "mine.yaml").write_text(
        subprocess.run([program, "config", "reference"], capture_output=True, text=True, check=True).stdout
    )
    shown = subprocess.run(
        [program, "config", "show", "--config", "mine.yaml"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "learning_rate: 0.0001" in shown.stdout


@pytest.mark.slow
def test_every_module_and_dependency_imports_from_the_wheel_alone(clean_python, tmp_path):
    modules = [path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "mochi_lora").rglob("*.py"))]
    names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in modules if parts[-1] != "__main__"]
    names = [name for name in names if name not in TAKEN_IF_THERE or importlib.util.find_spec(TAKEN_IF_THERE[name])]
    asked = [re.split(r"[>=]", text)[0] for text in PROJECT["dependencies"]]
    names += [IMPORTS.get(name, name.replace("-", "_")) for name in asked]
    code = (
        "import importlib as i, sys, mochi_lora; [i.import_module(name) for name in sys.argv[1:]]; print(mochi_lora.__file__)"
    )
    done = subprocess.run([clean_python, "-c", code, *names], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    where = Path(done.stdout.strip().splitlines()[-1])
    assert where.is_relative_to(clean_python.parents[1])
    assert not where.is_relative_to(ROOT)
