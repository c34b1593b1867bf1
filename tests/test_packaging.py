"""The package and the commands: one place of metadata, floors that suit Colab, a wheel that works where nothing else is."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path
from shlex import split

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import animatediff_lit

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "animatediff_lit"
NANO = PACKAGE / "weights" / "nano"

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
SETTINGS = ini["DEFAULT"]
REQUIREMENTS = [Requirement(r) for r in split(SETTINGS["requirements"])]
PINS = {r.name.lower(): r.specifier for r in map(Requirement, re.findall(r"^[^#\s].*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))}

# What Google Colab has installed: googlecolab/backend-info, snapshot of 2026-08-19.
COLAB = {"torch": "2.11.0", "diffusers": "0.39.0", "transformers": "5.15", "accelerate": "1.14.0", "numpy": "2.1.3", "matplotlib": "3.10.0",
         "ipywidgets": "7.7.1", "pillow": "11.3", "einops": "0.8.2", "imageio-ffmpeg": "0.6.0"}
# Not in our excerpt of that list. anywidget and mediapy are not there; Colab's diffusers, transformers and accelerate bring the others.
UNLISTED = {"anywidget", "mediapy", "psutil", "safetensors", "tokenizers", "tqdm"}


def command(*args, **kwargs) -> str:
    "Run a command without standard input, and return what it printed; if it fails, so does the test, with its words."
    done = subprocess.run([str(a) for a in args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, args))}\n{done.stdout}"
    return done.stdout


# ---- metadata
def test_version_is_the_same_everywhere():
    assert SETTINGS["version"] == animatediff_lit.__version__, "nbdev-bump-version changes __init__.py only: change settings.ini too"


def test_paths_are_the_same_in_both_files():
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    assert [nbdev[k] for k in ("lib_path", "nbs_path")] == [SETTINGS[k] for k in ("lib_path", "nbs_path")]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_colab_satisfies(requirement):
    name = requirement.name.lower()
    assert name in COLAB or name in UNLISTED, f"look {name} up in Colab's list and add it to COLAB or UNLISTED"
    if name in COLAB: assert Version(COLAB[name]) in requirement.specifier, f"Colab has {name} {COLAB[name]}: a reader there would have to download it"


def test_constraints_hold_what_is_required():
    "Each direct requirement is in the tested set, at a version that its own range allows."
    for requirement in REQUIREMENTS + [Requirement(r) for r in split(SETTINGS["dev_requirements"])]:
        (pin,) = PINS[requirement.name.lower()]
        assert pin.operator == "==" and pin.version in requirement.specifier, f"{requirement} against {pin}"


def test_constraints_serve_the_oldest_python():
    "Some packages ask for 3.11.5 or newer, and a newcomer may have 3.11.2."
    oldest = Version(SETTINGS["min_python"] + ".0")
    asks = {d.name.lower(): d.metadata["Requires-Python"] for d in distributions() if d.name.lower() in PINS}
    assert len(asks) > len(REQUIREMENTS), "the packages of constraints.txt are not installed here: run the tests with make test"
    refuse = {name: needs for name, needs in asks.items() if needs and oldest not in SpecifierSet(needs)}
    assert not refuse, f"pin older versions of these in constraints.txt: {refuse}"


# ---- the wheel
@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "A copy of what the repository holds, so that building leaves nothing behind and finds nothing left over."
    copy = tmp_path_factory.mktemp("source") / "repo"
    top = {p.name for p in ROOT.iterdir()} - {"animatediff_lit", "nbs", "tests"}
    skipped = {name for name in top if (ROOT / name).is_dir()}  # .venv, .git, build, demo, ...
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: (skipped if Path(folder) == ROOT else set()) | {"__pycache__", ".ipynb_checkpoints"})
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    "The wheel, built as `python -m build` does: an sdist from the source, the wheel from the sdist."
    out = tmp_path_factory.mktemp("wheel")
    command(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    command(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, sdist)
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    want = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    want |= {p.relative_to(ROOT).as_posix() for p in NANO.rglob("*") if p.is_file()}
    want |= {f"animatediff_lit/weights/nano/{part}" for part in ("model_index.json", "unet/config.json", "motion_adapter/config.json", "vae/config.json")}
    assert not want - names, f"missing in the wheel: {sorted(want - names)}"
    assert any(n.endswith("dist-info/licenses/LICENSE") for n in names), "the wheel has no LICENSE"
    strange = {n for n in names if not n.startswith("animatediff_lit")}
    assert not strange, f"the wheel should hold the package alone: {sorted(strange)}"


def test_wheel_from_the_repository_is_the_same(source, wheel, tmp_path):
    command(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source)
    (other,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(other).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        metadata = next(z.read(n).decode() for n in z.namelist() if n.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {SETTINGS['version']}\n" in metadata
    assert f"\nLicense-Expression: {SETTINGS['license']}\n" in metadata
    assert f"\nRequires-Python: >={SETTINGS['min_python']}\n" in metadata
    needed = {Requirement(r).name for r in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in r}
    assert needed == {r.name for r in REQUIREMENTS}


def test_nano_is_small():
    size = sum(p.stat().st_size for p in NANO.rglob("*") if p.is_file()) / 1e6
    assert 0 < size <= 20, f"{NANO.relative_to(ROOT)} has {size:.1f} MB; nano ships, and has at most 20"


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """Installed where the repository cannot be found, nano loads and makes an animation.

    To be quick and offline the environment borrows the other packages from this one, through a path file; the finder of an
    editable install is not read from there."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = {sysconfig.get_path(k) for k in ("purelib", "platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    command(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (tmp_path / "elsewhere").mkdir()
    code = """
import animatediff_lit
print(animatediff_lit.__file__)
from animatediff_lit.pipeline import AnimationPipeline
pipe = AnimationPipeline.from_pretrained('nano')
pipe('a red star moving left', num_inference_steps=2, seed=0).save('star.gif')
"""
    said = command(python, "-I", "-c", code, cwd=tmp_path / "elsewhere")
    assert Path(said.splitlines()[0]).is_relative_to(site.resolve()), f"this is not the installed package: {said.splitlines()[0]}"
    assert (tmp_path / "elsewhere" / "star.gif").read_bytes().startswith(b"GIF89a")


# ---- the commands
@pytest.fixture
def commands(tmp_path) -> Path:
    "A folder with the Makefile whose environment is a stand-in: its Python prints each of its arguments on a line."
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".made").write_text(f"{tmp_path}\n")
    return tmp_path


# without what an outer `make` hands down
CLEAN = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PROMPT", "PYTHON", "PIP_ARGS")}


def make(folder: Path, *args: str, **env: str) -> list[str]:
    return command("make", "-C", folder, "--no-print-directory", *args, env=CLEAN | env).splitlines()


def test_make_test_runs_pytest(commands):
    assert make(commands, "test") == ["<-m>", "<pytest>"]


def test_make_lab_opens_the_tour(commands):
    assert make(commands, "lab", "LAB_ARGS=--no-browser --port=0") == ["<-m>", "<jupyterlab>", "<--no-browser>", "<--port=0>", "<nbs/00_tour.ipynb>"]


@pytest.mark.parametrize("prompt", ["a blue star spinning clockwise", "it's a \"star\"", "a $HOME star; $(false) # `x`", "--out", "étoile  bleue"])
def test_make_demo_passes_the_prompt_as_it_is(commands, prompt):
    assert make(commands, "demo", f"PROMPT={prompt}") == ["<-m>", "<animatediff_lit.pipeline>", "<--out>", "<demo>", f"<--prompt={prompt}>"]


@pytest.mark.parametrize("env", [{}, {"PROMPT": "%n@%m"}], ids=["no prompt", "a shell's own PROMPT"])
def test_make_demo_without_a_prompt(commands, env):
    assert make(commands, "demo", **env) == ["<-m>", "<animatediff_lit.pipeline>", "<--out>", "<demo>"]


@pytest.mark.parametrize("python, says", [("/nowhere/python3", "not there"), ("old", "Python 3.9.6"), ("bare", "lacks the venv module")])
def test_environment_says_what_is_missing(commands, python, says):
    "No Python, an old one, one without venv (as Debian ships it): one clear sentence, and no environment that looks made."
    (commands / ".venv" / ".made").unlink()
    (commands / "old").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.6 && exit 0\nexit 1\n')
    (commands / "bare").write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 0;; *python_version*) echo 3.12.1;; *) exit 1;; esac\n')
    for stub in ("old", "bare"): (commands / stub).chmod(0o755)
    name = str(commands / python) if python != "/nowhere/python3" else python
    done = subprocess.run(["make", "-C", commands, "demo", f"PYTHON={name}"], env=CLEAN, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (commands / ".venv" / ".made").exists()


def test_readme_names_commands_that_exist(commands):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\$?\s*make ([a-z]+)|`make ([a-z]+)", readme, re.M))
    targets = {a or b for a, b in named}
    assert {"demo", "test", "lab"} <= targets, f"README.md should give the commands make demo, make test and make lab, it gives {sorted(targets)}"
    for target in targets: make(commands, "-n", target)
