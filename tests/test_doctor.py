"""The doctor: everything in order here, and every fault that it can find, made on purpose."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email.message import Message
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import matplotlib.font_manager
import PIL.features
import psutil
import pytest
import torch
import yaml

from animatediff_lit import doctor
from animatediff_lit.doctor import Finding, attempt, check_ffmpeg, check_fonts, check_memory, check_numbers, check_package
from animatediff_lit.doctor import check_python, check_weights, check_writing, deviation, examine, main, nano_numbers, promised, record
from animatediff_lit.pipeline import NANO, AnimationPipeline
from measure import MARK_TEXT, ROOT, chapters, spots


def failure(check, *args) -> str:
    "What the doctor says about a check that must fail: one sentence that says what to do."
    found = attempt("it", partial(check, *args))
    assert not found.ok and str(found).startswith("[FAIL] it ") and found.found.endswith(".") and ": " in found.found, found
    return found.found


def refuse(error: Exception):
    def raises(*args, **kwargs): raise error
    return raises


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "nano"))


def flip(file: Path, byte: int = -1, bit: int = 0b0100_0000) -> None:
    "One bit of the last weight: the highest of its exponent, if no other is named."
    content = bytearray(file.read_bytes())
    content[byte] ^= bit
    file.write_bytes(content)


# ---- in order
def test_this_machine_is_in_order(tmp_path, monkeypatch, capsys):
    "Nano's recorded numbers belong to the weights that ship: after a new training, python -m animatediff_lit.doctor --record."
    monkeypatch.chdir(tmp_path)
    status, lines = main([]), capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("[FAIL]") and "memory" not in line]           # other programs may have it
    assert not failed and (status == 0) == (lines[-1] == "Everything is in order."), "\n".join(lines)
    names = [line.split()[1].lower() for line in lines[1:-1]]
    assert names[0] == "python" and set(names) >= {"torch", "pillow", "nano's", "nano", "ffmpeg", "fonts", "memory", "this", "temporary"}
    assert not list(tmp_path.iterdir())


def test_it_looks_at_every_requirement():
    python, packages = promised()
    assert python == ">=3.11" and len(packages) > 10 and {p.split(">")[0].lower() for p in packages} <= set(doctor.tested())


def test_requirements_without_a_checkout(tmp_path, monkeypatch):
    about = Message()
    for name, value in (("Requires-Python", ">=3.11"), ("Requires-Dist", "torch>=2.11"), ("Requires-Dist", 'ruff==0.1; extra == "dev"')): about[name] = value
    monkeypatch.setattr(doctor, "metadata", lambda name: about)
    assert promised(tmp_path) == (">=3.11", ["torch>=2.11"]) and doctor.tested(tmp_path) == {}


@pytest.mark.parametrize("form", ["ISSUE_TEMPLATE/fault.yml", "ISSUE_TEMPLATE/idea.yml", "pull_request_template.md"])
def test_forms_ask_for_the_report(form):
    text = (ROOT / ".github" / form).read_text(encoding="utf-8")
    assert "make doctor" in text and "doctor's report" in text
    if form.endswith(".yml"): assert {part["id"] for part in yaml.safe_load(text)["body"]} == {"what", "doctor"}


# ---- out of order
def test_old_python(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.2")
    assert failure(check_python).startswith("3.9.2, but >=3.11 is needed")


@pytest.mark.parametrize("requirement, have", [("torch>=2.11", "2.10.1"), ("torch>=2.11", "2.10.1+cu128"), ("imageio-ffmpeg>=0.6,<0.8", "0.8.1")])
def test_package_of_the_wrong_version(requirement, have, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: have)
    said = failure(check_package, requirement)
    assert said.startswith(f"{have}, but ") and "pip install" in said


def test_development_version_will_do(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "2.14.0.dev20261101+cpu")
    assert "tested with" in check_package("torch>=2.11")


def test_package_that_is_not_there():
    assert failure(check_package, "no-such-package>=1").startswith("not installed, but >=1 is needed")


def test_damaged_weight(copy):
    file = "unet/diffusion_pytorch_model.safetensors"
    flip(copy / file)
    assert failure(check_weights, copy).startswith(f"{file} not as recorded")
    assert "cpu computes wrongly" in failure(check_numbers, copy, "cpu")


def test_missing_weights_and_record(copy):
    (copy / "video_encoder.safetensors").unlink()
    assert failure(check_weights, copy).startswith("video_encoder.safetensors not as recorded")
    (copy / "self_test.json").unlink()
    assert "--record" in failure(check_weights, copy) and "--record" in failure(check_numbers, copy, "cpu")


def test_new_weights_are_recorded(copy):
    flip(copy / "text_encoder" / "model.safetensors", byte=-4, bit=1)                                # the lowest
    assert failure(check_weights, copy)
    record(copy)
    assert check_weights(copy) == "5 files, as recorded" and check_numbers(copy, "cpu")


def test_backend_that_computes_wrongly(monkeypatch):
    right = torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda x, groups, weight=None, bias=None, eps=1e-5: right(x, groups, weight, bias, 1e-3))
    assert "cpu computes wrongly" in failure(check_numbers, NANO, "cpu")


def test_nan_is_far_from_everything():
    good = {"text": [1.0, -1.0], "latents": [2.0, 2.0]}
    assert deviation(good, good) == 0 and deviation({**good, "latents": [2.0, 2.5]}, good) == 0.25
    assert deviation({**good, "text": [float("nan"), -1.0]}, good) == float("inf")


@pytest.mark.parametrize("device", doctor.devices()[1:])
def test_other_devices_agree(device):
    assert deviation(nano_numbers(AnimationPipeline.from_pretrained("nano").to(device)), doctor.recorded(NANO)["numbers"]) < doctor.TOLERANCE[device]


def test_no_ffmpeg(monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", refuse(RuntimeError("No ffmpeg exe could be found.")))
    assert "No ffmpeg exe could be found" in failure(check_ffmpeg)


def test_ffmpeg_that_loses_frames(monkeypatch):
    monkeypatch.setattr("animatediff_lit.video.Video.load", lambda path: SimpleNamespace(frames=torch.zeros(3, 32, 32, 3)))
    assert "4 frames of 32 x 32 came back as" in failure(check_ffmpeg)


def test_no_fonts(monkeypatch):
    monkeypatch.setattr(matplotlib.font_manager, "findfont", refuse(ValueError("Failed to find font DejaVu Sans.")))
    assert not attempt("fonts", check_fonts).ok
    monkeypatch.setattr(PIL.features, "check", lambda feature: False)
    assert "without FreeType" in failure(check_fonts)


def test_read_only_folder(tmp_path):
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path / "shut"                               # root may write anywhere else
    if folder.parent == tmp_path: folder.mkdir(mode=0o555)
    assert failure(check_writing, folder).startswith(f"{folder} cannot be written to (")
    assert "cannot be written to" in failure(check_writing, tmp_path / "nowhere")


def test_little_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=300e6))
    assert failure(check_memory).startswith("300 MB free")


def test_enough_memory_is_asked_for():
    "Half as much again as the chapter that took most, by the cards."
    peaks = [int(found[2]) for notebook in chapters() for found in map(MARK_TEXT.match, spots(notebook.read_text(encoding="utf-8"))) if found]
    assert len(peaks) > 10 and doctor.NEEDED_MB > 1.5 * max(peaks)


def test_one_fault_is_enough(monkeypatch, capsys):
    def two(weights, folder): yield from (("one", lambda: "fine"), ("two", refuse(OSError("not fine: mend it."))))
    monkeypatch.setattr(doctor, "checks", two)
    assert main([]) == 1 and not examine(NANO, Path())
    assert capsys.readouterr().out.splitlines()[1:4] == [str(Finding("one", True, "fine")), str(Finding("two", False, "not fine: mend it.")),
                                                         "1 of these need attention: each line says what to do."]


def test_without_pytorch(tmp_path):
    "What is missing must not keep the doctor from saying so."
    code = "import sys; sys.modules['torch'] = None; from animatediff_lit.doctor import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "[FAIL] nano on cpu" in done.stdout and "[OK]   memory" in done.stdout
