"""Checkpoints: every layout in, both layouts out, the same frames as diffusers, and bad files refused in one sentence."""
from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import files as installed_files
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from animatediff_lit import checkpoints
from animatediff_lit.checkpoints import (MotionModules, fit_positions, join_motion, load_motion_module, motion_shapes, our_name,
                                         original_names, probe_checkpoint, save_motion_module, scheduler_for, structure)
from animatediff_lit.pipeline import AnimationPipeline
from animatediff_lit.temporal import sinusoidal_positions
from animatediff_lit.unet import UNet3DConditionModel
from measure import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning")

# ---- the released files, written down by themselves: what the original code and the published configs say
FULL, XL = (320, 640, 1280, 1280), (320, 640, 1280)
RELEASES = {"sd15-v1": ("v1", FULL, False, 24, 417_137_600, 560, 540), "sd15-v2": ("v2", FULL, True, 32, 453_209_280, 588, 567),
            "sd15-v3": ("v3", FULL, False, 32, 417_137_600, 560, 540), "sdxl-beta": ("SDXL beta", XL, False, 32, 236_779_200, 420, 405)}
TINY = (32, 64)
NORMS = {"v1": "v1", "v2": "per_frame", "v3": "per_frame", "SDXL beta": "all_frames"}


def original_spec(widths: tuple[int, ...], mid: bool, frames: int, layers: int = 2) -> dict[str, tuple[int, ...]]:
    "Names and shapes of an original motion module."
    places = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(widths) for j in range(layers)]
    places += [("mid_block.motion_modules.0", widths[-1])] if mid else []
    places += [(f"up_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(widths[::-1]) for j in range(layers + 1)]
    spec: dict[str, tuple[int, ...]] = {}
    for place, c in places:
        top, block = f"{place}.temporal_transformer", f"{place}.temporal_transformer.transformer_blocks.0"
        for name in ("norm", "proj_in", "proj_out"): spec |= {f"{top}.{name}.weight": (c,) if name == "norm" else (c, c), f"{top}.{name}.bias": (c,)}
        for i in (0, 1):
            attention = f"{block}.attention_blocks.{i}"
            spec |= {f"{attention}.{part}.weight": (c, c) for part in ("to_q", "to_k", "to_v", "to_out.0")}
            spec |= {f"{attention}.to_out.0.bias": (c,), f"{attention}.pos_encoder.pe": (1, frames, c)}
            spec |= {f"{block}.norms.{i}.weight": (c,), f"{block}.norms.{i}.bias": (c,)}
        spec |= {f"{block}.ff.net.0.proj.weight": (8 * c, c), f"{block}.ff.net.0.proj.bias": (8 * c,), f"{block}.ff.net.2.weight": (c, 4 * c),
                 f"{block}.ff.net.2.bias": (c,), f"{block}.ff_norm.weight": (c,), f"{block}.ff_norm.bias": (c,)}
    return spec


def fill(spec: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, scale: float = 0.05) -> dict[str, Tensor]:
    "Random weights, and the usual encodings, for names and shapes; every tensor is a different stretch of one pool."
    pool, at, weights = scale * torch.randn(10_000_019, generator=torch.Generator().manual_seed(0)), 0, {}
    pool = torch.cat([pool.to(dtype), pool[:9_000_000].to(dtype)])
    for name, shape in spec.items():
        if name.endswith(".pe"): weights[name] = sinusoidal_positions(*shape[1:]).to(dtype); continue
        n = math.prod(shape)
        parts, left = [], n
        while left: parts.append(pool[at:at + min(left, 9_000_000)]); left -= len(parts[-1]); at = (at + 7919 * 31) % 10_000_019
        weights[name] = torch.cat(parts).view(shape) if len(parts) > 1 else parts[0].clone().view(shape)
    return weights


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tensor]:
    "A motion module of two levels in the original layout, with a middle and position encodings that no formula gives back."
    weights = fill(original_spec(TINY, True, 24, layers=1))
    for name in weights:
        if name.endswith(".pe"): weights[name] = weights[name] * 1.5
    return weights


def ours(original: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_name(name): t for name, t in original.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    wrong = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not wrong, wrong[:3]


def sparse(path: Path, spec: dict[str, tuple[int, ...]]) -> Path:
    "A safetensors file with a real header and a hole for its weights."
    header, end = {}, 0
    for name, shape in spec.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


# ---- released structures, without their weights
@pytest.mark.parametrize("preset", RELEASES)
def test_released_structure(preset):
    version, widths, mid, frames, parameters, in_original, in_diffusers = RELEASES[preset]
    spec = original_spec(widths, mid, frames)
    with torch.device("meta"):
        modules = MotionModules(UNet3DConditionModel.from_preset(preset))
        adapter = diffusers.MotionAdapter(block_out_channels=widths, use_motion_mid_block=mid, motion_max_seq_length=frames)
    made = {name: tuple(t.shape) for name, t in modules.state_dict().items()}
    assert made == {name: tuple(t.shape) for name, t in adapter.state_dict().items()} and len(made) == in_diffusers
    assert {new: shape for name, shape in made.items() for new in original_names(name)} == spec and len(spec) == in_original
    assert sum(p.numel() for p in modules.parameters()) == parameters
    assert motion_shapes(structure(modules.state_dict())) == made


@pytest.mark.parametrize("preset", RELEASES)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_probe_release(preset, layout, tmp_path):
    version, widths, mid, frames, parameters, *counts = RELEASES[preset]
    spec = original_spec(widths, mid, frames)
    if layout == "diffusers": spec = {our_name(name): shape for name, shape in spec.items()}
    found = probe_checkpoint(sparse(tmp_path / "motion.safetensors", spec))
    assert (found.kind, found.version, found.layout, found.positions) == (f"motion module {version}", version, layout, frames)
    assert found.parameters == parameters and found.tensors == counts[layout == "diffusers"] and found.dtype == "float32" and not found.problems
    assert found.config["motion_norm"] == ("all_frames" if layout == "diffusers" else NORMS[version])
    for word in (version, layout, f"{parameters:,}", str(frames), "float32"): assert word in str(found)


def test_probe_is_quick_and_small(tmp_path):
    "A safetensors file of 2 GB: under a second and under 100 MB, the first time in a process."
    spec = original_spec(FULL, True, 32)
    file = sparse(tmp_path / "large.safetensors", spec | {"down_blocks.0.motion_modules.0.extra": (50_000_000,)})
    assert file.stat().st_size > 2e9
    code = f"""import re, time
from animatediff_lit.checkpoints import probe_checkpoint
def memory(what): return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
before, start = memory("VmRSS"), time.process_time()
found = probe_checkpoint({str(file)!r})
print(time.process_time() - start, memory("VmHWM") - before, len(found.unexpected))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    seconds, megabytes, unexpected = map(float, done.stdout.split())
    assert seconds < 1 and megabytes < 100 and unexpected == 1, done.stdout


MODULE = "down_blocks.0.motion_modules.0.temporal_transformer"
ATTENTION = f"{MODULE}.transformer_blocks.0.attention_blocks.0"
SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LCM = {name: shape for name, shape in original_spec(FULL, True, 32).items() if not name.endswith(".pe")}
KINDS = {
    "MotionLoRA": {f"{ATTENTION}.processor.to_q_lora.down.weight": (64, 320), f"{ATTENTION}.processor.to_q_lora.up.weight": (320, 64)},
    "domain adapter": {f"{SPATIAL}.processor.to_q_lora.down.weight": (128, 320), f"{SPATIAL}.processor.to_q_lora.up.weight": (320, 128)},
    "SparseCtrl RGB": {"controlnet_cond_embedding.weight": (320, 5, 3, 3), f"{ATTENTION}.to_q.weight": (320, 320)},
    "SparseCtrl scribble": {"controlnet_cond_embedding.conv_in.weight": (16, 4, 3, 3), f"{ATTENTION}.to_q.weight": (320, 320)},
    "HotshotXL motion module": {"down_blocks.0.temporal_attentions.0.transformer_blocks.0.attention_blocks.0.pos_encoder.positional_encoding": (1, 24, 320)},
    "PIA motion module": {"conv_in.weight": (320, 9, 3, 3), f"{MODULE}.norm.weight": (320,)},
    "AnimateLCM motion module": LCM,
    "whole-UNet training checkpoint": original_spec(FULL, False, 24) | {"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
    "something else: an image model in a single file": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "something else: a ControlNet": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
    "something else: a LoRA for an image model": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (8, 320)},
    "something else: a UNet without motion modules": {"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
    "something else: a text encoder": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "something else: an autoencoder": {"encoder.conv_in.weight": (128, 3, 3, 3)},
    "something else: no model known here, its first name is 'a.b'": {"a.b": (3,)}}


@pytest.mark.parametrize("kind", KINDS)
def test_probe_kind(kind, tmp_path):
    found = probe_checkpoint(sparse(tmp_path / "file.safetensors", KINDS[kind]))
    assert found.kind == kind and kind in str(found)
    assert (found.config is not None) == (kind in ("AnimateLCM motion module", "whole-UNet training checkpoint"))


def test_probe_says_what_is_wrong(tiny, tmp_path):
    names = sorted(tiny)
    weights = {name: t for name, t in tiny.items() if name != names[3]} | {names[5]: torch.zeros(7), f"{MODULE}.more": torch.zeros(2)}
    torch.save(weights, tmp_path / "file.ckpt")
    found = probe_checkpoint(tmp_path / "file.ckpt")
    assert found.missing == (names[3],) and found.unexpected == (f"{MODULE}.more",) and found.misshapen == (names[5],) and names[3] in str(found)


# ---- every layout in
WRAPPINGS: dict[str, Callable] = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w},
    "module.": lambda w: {"epoch": 1, "global_step": 9, "state_dict": {f"module.{n}": t for n, t in w.items()}},
    "bare with module.": lambda w: {f"module.{n}": t for n, t in w.items()},
    "animatediff_config": lambda w: {"state_dict": w | {"animatediff_config": ""}},
    "animatediff_config beside": lambda w: {"animatediff_config": {"unused": [1, None]}, "state_dict": w},
    "whole UNet": lambda w: {"state_dict": {f"module.{n}": t for n, t in (w | {"conv_in.weight": torch.zeros(32, 4, 3, 3), "time_embedding.linear_1.weight": torch.zeros(8, 8)}).items()}}}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_original(wrapping, dtype, tiny, tmp_path):
    weights = {name: t.to(dtype) for name, t in tiny.items()}
    torch.save(WRAPPINGS[wrapping](weights), tmp_path / "file.ckpt")
    modules = load_motion_module(tmp_path / "file.ckpt")
    same(modules.state_dict(), ours(weights))
    assert modules.config.motion_max_seq_length == 24 and modules.source.layout == "original" and not modules.training
    same(load_motion_module(tmp_path / "file.ckpt", dtype=torch.float32).state_dict(), ours({n: t.float() for n, t in weights.items()}))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("how", ["safetensors", "safetensors named ckpt", "ckpt", "legacy", "bin"])
def test_containers(layout, how, tiny, tmp_path):
    weights = tiny if layout == "original" else ours(tiny)
    file = tmp_path / {"safetensors": "a.safetensors", "bin": "a.bin"}.get(how, "a.ckpt")
    if "safetensors" in how: save_file({n: t.clone() for n, t in weights.items()}, file)
    else: torch.save(weights, file, _use_new_zipfile_serialization=how != "legacy")
    modules = load_motion_module(file)
    same(modules.state_dict(), ours(tiny))
    assert modules.config.motion_norm == ("per_frame" if layout == "original" else "all_frames")


@pytest.fixture(scope="module")
def adapter_folder(tiny, tmp_path_factory) -> Path:
    "Written by diffusers itself."
    adapter = diffusers.MotionAdapter(block_out_channels=TINY, motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=4, motion_max_seq_length=24)
    adapter.load_state_dict(ours(tiny), strict=True)
    folder = tmp_path_factory.mktemp("adapter")
    adapter.save_pretrained(folder)
    return folder


def test_adapter_folder(adapter_folder, tiny, tmp_path):
    modules = load_motion_module(adapter_folder)
    same(modules.state_dict(), ours(tiny))
    assert (modules.config.motion_norm, modules.config.motion_num_attention_heads, modules.config.norm_num_groups) == ("all_frames", 4, 4)
    for variant in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        folder = Path(shutil.copytree(adapter_folder, tmp_path / variant))
        file = folder / "diffusion_pytorch_model.safetensors"
        if variant.endswith("bin"): torch.save(load_file(file), folder / variant)
        else: save_file({n: t.half() for n, t in load_file(file).items()}, folder / variant)
        file.unlink()
        assert load_motion_module(folder).state_dict().keys() == modules.state_dict().keys()


def test_old_config_fields_are_tolerated(adapter_folder, tiny, tmp_path):
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text()) | {"motion_activation_fn": "geglu", "motion_attention_bias": False, "motion_cross_attention_dim": None}
    (folder / "config.json").write_text(json.dumps(config))
    same(load_motion_module(folder).state_dict(), ours(tiny))


def test_sharded_folder(adapter_folder, tiny, tmp_path):
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "shards"))
    file, items = folder / "diffusion_pytorch_model.safetensors", list(load_file(folder / "diffusion_pytorch_model.safetensors").items())
    for i, part in enumerate((items[::2], items[1::2]), 1): save_file(dict(part), folder / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    file.unlink()
    same(load_motion_module(folder).state_dict(), ours(tiny))
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks the weight"): load_motion_module(folder)


def test_hub_ids(adapter_folder, tiny, tmp_path, monkeypatch):
    import huggingface_hub
    torch.save(tiny, tmp_path / "mm.ckpt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, allow_patterns: str(adapter_folder) if repo_id == "someone/adapter" else None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / file) if repo == "someone/files" else None)
    for name in ("someone/adapter", "someone/files/mm.ckpt"): same(load_motion_module(name).state_dict(), ours(tiny))


def test_no_such_file(tmp_path, monkeypatch):
    import huggingface_hub
    def offline(*args, **kwargs): raise OSError("offline")
    for name in ("snapshot_download", "hf_hub_download"): monkeypatch.setattr(huggingface_hub, name, offline)
    for name, words in ((tmp_path / "no.ckpt", "There is no file"), ("no.safetensors", "There is no file"), (tmp_path / "no", "There is no folder"),
                        ("a/b/c.ckpt", "could not be fetched"), ("a/b", "could be fetched"), (tmp_path, "holds no motion adapter")):
        with pytest.raises(FileNotFoundError, match=words) as caught: load_motion_module(name)
        assert "\n" not in str(caught.value)


# ---- what follows from the file, and what overrides it
def test_overrides(tiny, tmp_path):
    torch.save(tiny, tmp_path / "file.ckpt")
    table = tiny[f"{ATTENTION}.pos_encoder.pe"]
    name = our_name(f"{ATTENTION}.pos_encoder.pe")
    modules = load_motion_module(tmp_path / "file.ckpt", motion_norm="v1", max_frames=9, num_heads=2)
    assert torch.equal(modules.state_dict()[name], table[:, :9])
    assert (modules.config.motion_norm, modules.config.motion_max_seq_length, modules.config.motion_num_attention_heads) == ("v1", 9, 2)
    with pytest.raises(ValueError, match="max_frames is 25, and the position encodings in .* end at 24"): load_motion_module(tmp_path / "file.ckpt", max_frames=25)
    for bad in (0, -1, 10**6):
        with pytest.raises(ValueError, match="max_frames is"): load_motion_module(tmp_path / "file.ckpt", max_frames=bad)
    with pytest.raises(ValueError, match="sideways"): load_motion_module(tmp_path / "file.ckpt", motion_norm="sideways")
    with pytest.raises(ValueError, match="7 heads"): load_motion_module(tmp_path / "file.ckpt", num_heads=7)


def test_more_frames():
    usual = sinusoidal_positions(40, 32)
    torch.testing.assert_close(fit_positions(usual[:, :24], 40, Path("x")), usual)
    assert fit_positions(usual[:, :24].half(), 40, Path("x")).dtype == torch.float16


def test_file_without_encodings(tmp_path):
    spec = {name: shape for name, shape in original_spec(TINY, True, 24, layers=1).items() if not name.endswith(".pe")}
    torch.save(fill(spec), tmp_path / "file.ckpt")
    table = load_motion_module(tmp_path / "file.ckpt", max_frames=48).state_dict()[our_name(f"{ATTENTION}.pos_encoder.pe")]
    torch.testing.assert_close(table, sinusoidal_positions(48, 32))


def test_schedulers():
    "The original code's schedules: values of ᾱ at the last timestep, and its 25 DDIM timesteps."
    base = diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    for version in ("v1", "v2", "v3"):
        ddim = scheduler_for(version, base)
        ddim.set_timesteps(25)
        assert ddim.timesteps.tolist() == list(range(961, 0, -40)) and ddim.config.prediction_type == "v_prediction" and not ddim.config.clip_sample
        assert abs(ddim.alphas_cumprod[999].item() - 0.001579) < 1e-6 and abs(ddim.alphas_cumprod[500].item() - 0.1608) < 1e-4 and ddim.final_alpha_cumprod == 1
    xl, lcm = scheduler_for("SDXL beta", base), scheduler_for("AnimateLCM", base)
    assert abs(xl.alphas_cumprod[999].item() - 0.00023) < 1e-5 and isinstance(xl, diffusers.EulerDiscreteScheduler)
    assert isinstance(lcm, diffusers.LCMScheduler) and lcm.config.original_inference_steps == 100 and lcm.config.beta_schedule == "linear"
    assert scheduler_for("custom", base) is base and scheduler_for(None, base) is base


# ---- both layouts out
@pytest.mark.parametrize("name", ["back.ckpt", "back.safetensors"])
def test_round_trip(name, tiny, tmp_path):
    torch.save({"state_dict": tiny}, tmp_path / "first.ckpt")
    folder = save_motion_module(load_motion_module(tmp_path / "first.ckpt", num_heads=4), tmp_path / "adapter", format="diffusers")
    back = save_motion_module(load_motion_module(folder), tmp_path / name)
    same(load_file(back) if name.endswith("s") else torch.load(back, weights_only=True)["state_dict"], tiny)
    for path in (folder, back):
        config = load_motion_module(path).config
        assert (config.motion_norm, config.motion_num_attention_heads, config.motion_max_seq_length) == ("per_frame", 4, 24)
    assert {p.name for p in tmp_path.iterdir()} == {"first.ckpt", "adapter", name} and back.stat().st_mode & 0o444 == 0o444


@pytest.fixture
def room(tmp_path):
    "A folder for gigabytes, which do not stay behind as pytest's own folders do."
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_full_size_v3_round_trip(room):
    "Original to ours to diffusers to original at full size, in float16: not a bit changes."
    original = fill(original_spec(FULL, False, 32), torch.float16)
    sums = {name: (t.view(torch.int16).sum(dtype=torch.int64).item(), t.flatten()[[0, -1]].tolist()) for name, t in original.items()}
    torch.save(original, room / "v3_sd15_mm.ckpt")
    del original
    modules = load_motion_module(room / "v3_sd15_mm.ckpt")
    assert sum(p.numel() for p in modules.parameters()) == 417_137_600 and modules.source.version == "v3" and modules.config.motion_norm == "per_frame"
    save_motion_module(modules, room / "adapter", format="diffusers")
    same(load_file(room / "adapter" / "diffusion_pytorch_model.safetensors"), modules.state_dict())
    del modules
    again = load_motion_module(room / "adapter")
    save_motion_module(again, room / "back.ckpt")
    del again
    a, b = (torch.load(room / file, weights_only=True, mmap=True) for file in ("v3_sd15_mm.ckpt", "back.ckpt"))
    same(a, b["state_dict"])
    assert sums == {name: (t.view(torch.int16).sum(dtype=torch.int64).item(), t.flatten()[[0, -1]].tolist()) for name, t in a.items()}


def test_diffusers_loads_what_we_save(tiny, tmp_path):
    torch.save(tiny, tmp_path / "first.ckpt")
    folder = save_motion_module(load_motion_module(tmp_path / "first.ckpt", num_heads=4), tmp_path / "adapter", format="diffusers")
    adapter, info = diffusers.MotionAdapter.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and adapter.config.motion_num_attention_heads == 4
    same(adapter.state_dict(), ours(tiny))


def test_saving_what_cannot_be_saved(tiny, tmp_path, monkeypatch):
    torch.save(tiny, tmp_path / "first.ckpt")
    modules = load_motion_module(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match="format is 'onnx'"): save_motion_module(modules, tmp_path / "a", format="onnx")
    with pytest.raises(TypeError, match="modules is of the type OrderedDict"): save_motion_module(modules.state_dict(), tmp_path / "a")
    with pytest.raises(ValueError, match="motion_context"): save_motion_module(UNet3DConditionModel(motion_context_dim=8), tmp_path / "a")
    (tmp_path / "thesis").mkdir(); (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no folder of a motion adapter"): save_motion_module(modules, tmp_path / "thesis", format="diffusers")
    with pytest.raises(FileExistsError, match="is a folder"): save_motion_module(modules, tmp_path / "thesis")
    before = (tmp_path / "first.ckpt").read_bytes()
    def full(*args, **kwargs): raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"): save_motion_module(modules, tmp_path / "first.ckpt")
    assert (tmp_path / "first.ckpt").read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["first.ckpt", "thesis"]


# ---- a pipeline with the real tokenizer of CLIP
@pytest.fixture(scope="module")
def vocabulary() -> Path:
    (found,) = [f for f in installed_files("openai-clip") if f.name == "bpe_simple_vocab_16e6.txt.gz"]
    return Path(found.locate())


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> CLIPTokenizer:
    "Stable Diffusion's tokenizer, put together from the vocabulary as CLIP's authors published it."
    merges = gzip.open(vocabulary, "rt", encoding="utf-8").read().split("\n")[1:49152 - 256 - 2 + 1]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    words = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[tuple(m.split()) for m in merges], model_max_length=77)


@pytest.fixture(scope="module")
def published(vocabulary):
    "The tokenizer of CLIP's authors."
    spec = importlib.util.spec_from_file_location("simple_tokenizer", vocabulary.with_name("simple_tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


PROMPTS = {"plain": "a photo of a cat, 35mm, f/1.8", "empty": "", "chinese": "一只红色的星星在黑暗中旋转", "arabic": "نجمة حمراء تتحرك", "french": "une étoile à l'île, ça brûle",
           "emoji": "a star ⭐ moving 🚀 left", "shouting": "A RED STAR!!! don't   stop", "long": " ".join(["a red star moving left over the dark blue sea"] * 12)}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokenizer_is_clips(prompt, tokenizer, published):
    assert len(tokenizer) == 49408
    assert tokenizer(PROMPTS[prompt], verbose=False).input_ids == [49406, *published.encode(PROMPTS[prompt]), 49407]


@pytest.fixture(scope="module")
def image_model(tokenizer) -> diffusers.StableDiffusionPipeline:
    "Random components, all of the kinds that Stable Diffusion has."
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(block_out_channels=TINY, layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4, sample_size=4,
                                          down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=16, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                                        max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)).eval()
    with torch.no_grad():
        for part in (unet, vae):
            for p in part.parameters(): p += 0.05 * torch.randn(p.shape)
    scheduler = diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1)
    return diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def base(image_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    image_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(base, adapter_folder) -> diffusers.AnimateDiffPipeline:
    pipe = diffusers.AnimateDiffPipeline.from_pretrained(base, motion_adapter=diffusers.MotionAdapter.from_pretrained(adapter_folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mine(base, adapter_folder) -> AnimationPipeline:
    return AnimationPipeline.from_pretrained(base, motion=adapter_folder)


BETAS = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
SAMPLERS = {"DDIM": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1), "Euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS),
            "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++"), "LCM": lambda: diffusers.LCMScheduler(**BETAS)}


@pytest.fixture
def in_float64(mine, theirs):
    for pipe in (mine, theirs): pipe.to(torch.float64)
    yield
    for pipe in (mine, theirs): pipe.to(torch.float32)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("frames", [8, 16])
def test_pipeline_parity(sampler, scale, frames, mine, theirs, in_float64):
    "From the same noise, embeddings and scheduler: the same latents and frames as diffusers' pipeline; with 64 bits, for how sums are rounded is the processor's."
    noise = torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    mine.scheduler, theirs.scheduler = SAMPLERS[sampler](), SAMPLERS[sampler]()
    generator, last = torch.Generator().manual_seed(5), []
    torch.randn(noise.shape, generator=generator)                           # ours draws the noise that `latents` replaces
    video = mine(PROMPTS["chinese"], video_length=frames, num_inference_steps=3, guidance_scale=scale, negative_prompt="", seed=5, latents=noise,
                 progress=False, callback=lambda step, t, z: last.append(z))
    prompt, negative = (mine.encode_prompt(text) for text in (PROMPTS["chinese"], ""))
    expected = theirs(prompt_embeds=prompt, negative_prompt_embeds=negative, num_frames=frames, num_inference_steps=3, guidance_scale=scale, latents=noise,
                      generator=generator, output_type="latent").frames
    assert expected.isfinite().all() and (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(last[-1], expected, atol=1e-4, rtol=1e-4)
    pixels = theirs.video_processor.postprocess_video(theirs.decode_latents(expected), output_type="pt")[0]     # f c h w, 0 to 1
    decoded = theirs.video_processor.postprocess_video(theirs.decode_latents(last[-1]), output_type="pt")[0]
    torch.testing.assert_close(decoded, pixels, atol=1e-4, rtol=0)
    assert (torch.from_numpy(video.frames).permute(0, 3, 1, 2) / 255 - pixels).abs().max() < 0.5 / 255 + 1e-4


def test_embeddings_are_diffusers(mine, theirs):
    for name, prompt in PROMPTS.items():
        if name == "long": continue
        torch.testing.assert_close(mine.encode_prompt(prompt), theirs.encode_prompt(prompt, "cpu", 1, False)[0], msg=name)


def test_prompts(mine):
    "Too long is refused with the count, where others cut it silently; an empty prompt is no prompt, an empty negative one is."
    quick = dict(num_inference_steps=1, video_length=2, progress=False)
    with pytest.raises(ValueError, match=r"has 120 words or word pieces and the text encoder reads 75: shorten it"): mine(PROMPTS["long"], **quick)
    with pytest.raises(ValueError, match="The prompt is empty"): mine("", **quick)
    mine.scheduler = SAMPLERS["DDIM"]()
    for name in ("chinese", "arabic", "emoji"): assert mine(PROMPTS[name], negative_prompt="", **quick).frames.shape == (2, 8, 8, 3)


def test_original_file_in_a_pipeline(base, tiny, adapter_folder, tmp_path, monkeypatch):
    "The same weights from an original file, another norm, the scheduler of the release; and everything can be said otherwise."
    torch.save({"state_dict": tiny}, tmp_path / "mm.ckpt")
    pipe = AnimationPipeline.from_pretrained(base, motion=tmp_path / "mm.ckpt")
    assert pipe.unet.config.motion_norm == "per_frame" and pipe.unet.config.motion_max_seq_length == 24 and pipe.unet.config.norm_num_groups == 4
    assert isinstance(pipe.scheduler, diffusers.PNDMScheduler)                                           # no release: that of the base
    same({n: t for n, t in pipe.unet.state_dict().items() if "motion_modules." in n}, ours(tiny))
    monkeypatch.setattr(checkpoints, "version_of", lambda *args: "v3")
    pipe = AnimationPipeline.from_pretrained(base, motion=tmp_path / "mm.ckpt")
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler) and pipe.scheduler.config.beta_schedule == "linear"
    euler = diffusers.EulerDiscreteScheduler()
    pipe = AnimationPipeline.from_pretrained(base, motion=tmp_path / "mm.ckpt", motion_norm="v1", scheduler=euler, max_frames=12)
    assert pipe.scheduler is euler and pipe.unet.config.motion_norm == "v1"
    with pytest.raises(ValueError, match="position encodings for 12 frames"): pipe("a star", video_length=13)


def test_unet_motion_model(base, theirs, mine, tiny, tmp_path):
    "What diffusers saves of its whole pipeline holds a UNetMotionModel: as motion, and as a base with motion of its own."
    folder = tmp_path / "saved"
    theirs.save_pretrained(folder)
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "UNetMotionModel"
    assert probe_checkpoint(folder / "unet").kind == "UNetMotionModel"
    same(load_motion_module(folder / "unet").state_dict(), ours(tiny))
    pipe = AnimationPipeline.from_pretrained(folder)
    same(pipe.unet.state_dict(), mine.unet.state_dict())
    assert pipe.unet.config == mine.unet.config and type(pipe.scheduler) is type(theirs.scheduler)
    same(AnimationPipeline.from_pretrained(base, motion=folder / "unet").unet.state_dict(), mine.unet.state_dict())


def test_base_without_motion(base, tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no motion_adapter, so it is an image model"): AnimationPipeline.from_pretrained(base)
    torch.save(tiny, tmp_path / "mm.ckpt")
    with pytest.raises(ValueError, match="loaded already"): AnimationPipeline.from_pretrained(base, motion=load_motion_module(tmp_path / "mm.ckpt"), max_frames=3)


def test_failed_join_changes_nothing(mine, tmp_path):
    other = MotionModules(UNet3DConditionModel(block_out_channels=(16, 64), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlockMotion",) * 2,
                                               up_block_types=("UpBlockMotion",) * 2))
    before = {name: t.clone() for name, t in mine.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"made for block_out_channels \(16, 64\) and the image model has \(32, 64\): give an image model for"): join_motion(mine.unet, other)
    same(mine.unet.state_dict(), before)


# ---- base models in a single file
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}


def ldm_unet_name(name: str, layers: int = 1) -> str:
    "The name in Stable Diffusion's first layout of a weight of diffusers' UNet."
    for ours_, ldm in OUTER.items():
        if name.startswith(ours_ + "."): return name.replace(ours_, ldm)
    side, rest = name.split(".", 1)
    if side != "mid_block": block, rest = int(rest.split(".", 1)[0]), rest.split(".", 1)[1]
    kind, i, rest = rest.split(".", 2)
    for ours_, ldm in RESNET.items() if kind == "resnets" else (): rest = re.sub(rf"^{ours_}\.", f"{ldm}.", rest)
    slot = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "mid_block": return f"middle_block.{1 if slot else 2 * int(i)}.{rest}"
    if kind == "downsamplers": return f"input_blocks.{1 + block * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers": return f"output_blocks.{block * (layers + 1) + layers}.1.{rest}"                # the first up block has no attention
    return f"input_blocks.{1 + block * (layers + 1) + int(i)}.{slot}.{rest}" if side == "down_blocks" else f"output_blocks.{block * (layers + 1) + int(i)}.{slot}.{rest}"


def ldm_vae_name(name: str, levels: int = 2) -> str:
    swap = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out",
            "to_q": "q", "to_k": "k", "to_v": "v", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "samplers.0": "sample"}
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name).replace("down_blocks", "down").replace("resnets", "block")
    for ours_, ldm in ({k.replace("resnets", "block"): v for k, v in swap.items()}).items(): name = name.replace(ours_, ldm)
    return name


@pytest.fixture(scope="module")
def single_file(image_model, tmp_path_factory) -> Path:
    weights = {f"model.diffusion_model.{ldm_unet_name(n)}": t for n, t in image_model.unet.state_dict().items()}
    for n, t in image_model.vae.state_dict().items():
        squeeze = "attentions" in n and t.ndim == 2
        weights[f"first_stage_model.{ldm_vae_name(n)}"] = t[:, :, None, None] if squeeze else t
    weights |= {"cond_stage_model.transformer." + (n if n.startswith("text_model.") else f"text_model.{n}"): t for n, t in image_model.text_encoder.state_dict().items()}
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({n: t.contiguous() for n, t in weights.items()}, file)
    return file


def test_single_file(single_file, base, adapter_folder, mine):
    "Weights from the file, configs and tokenizer from a folder; nothing goes to the network."
    pipe = AnimationPipeline.from_pretrained(single_file, motion=adapter_folder, config=base)
    same(pipe.unet.state_dict(), mine.unet.state_dict())
    for part in ("vae", "text_encoder"): same(getattr(pipe, part).state_dict(), getattr(mine, part).state_dict())
    torch.testing.assert_close(pipe.encode_prompt("a star"), mine.encode_prompt("a star"))


def test_single_file_trouble(single_file, base, adapter_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is an image model: name a motion module"): AnimationPipeline.from_pretrained(single_file, config=base)
    with pytest.raises(FileNotFoundError, match="There is no file"): AnimationPipeline.from_pretrained(tmp_path / "no.safetensors", motion=adapter_folder)
    with pytest.raises(ValueError, match="is a motion module: give an image model in one file"):
        AnimationPipeline.from_pretrained(adapter_folder / "diffusion_pytorch_model.safetensors", motion=adapter_folder)
    with pytest.raises(NotImplementedError, match="SDXL"):
        AnimationPipeline.from_pretrained(sparse(tmp_path / "xl.safetensors", {"conditioner.embedders.1.model.x": (2,)}), motion=adapter_folder)
    def offline(*args, **kwargs): raise OSError("no connection\nno luck")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", offline)
    with pytest.raises(ValueError, match="needs a connection; without one, name a folder with config=") as caught: AnimationPipeline.from_pretrained(single_file, motion=adapter_folder)
    assert "\n" not in str(caught.value)


# ---- bad files
class Runs:
    "A pickle of this would run `touch MARK`, through whichever function."
    def __init__(self, function: Callable, *args): self.call = function, args
    def __reduce__(self): return self.call


def raw_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {f"{MODULE}.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive: archive.writestr("word/document.xml", "<xml/>")


def change(name: str, make: Callable[[Tensor], Tensor]) -> Callable:
    return lambda w, mark: {n: make(t) if n == name else t for n, t in w.items()}


FIRST, PE = f"{MODULE}.norm.weight", f"{ATTENTION}.pos_encoder.pe"
CUT = "is cut off|is a damaged pickle"
BYTES: dict[str, tuple[str, Callable[[dict[str, bytes]], bytes], str]] = {}
for i, part in enumerate((0, 4, 8, 100, -1, -5000)): BYTES[f"safetensors cut at {part}"] = ("a.safetensors", lambda g, p=part: g["safetensors"][:p], "is empty|cut off|begins with")
for i, part in enumerate((0, 2, 4, 300, -1, -100, -20_000)): BYTES[f"ckpt cut at {part}"] = ("a.ckpt", lambda g, p=part: g["ckpt"][:p], "is empty|begins with|" + CUT)
for i, part in enumerate((1, 10, 5000, -100)): BYTES[f"legacy ckpt cut at {part}"] = ("a.ckpt", lambda g, p=part: g["legacy"][:p], CUT)
BYTES |= {
    "half a download, rest zeros": ("a.ckpt", lambda g: g["ckpt"][:20_000] + bytes(len(g["ckpt"]) - 20_000), CUT),
    "never downloaded, all zeros": ("a.safetensors", lambda g: bytes(5000), "begins with zeros"),
    "middle overwritten": ("a.ckpt", lambda g: g["ckpt"][:64] + bytes(3000) + g["ckpt"][3064:], CUT),
    "more than promised": ("a.safetensors", lambda g: g["safetensors"] + b"more", "header promises"),
    "header of terabytes": ("a.safetensors", lambda g: raw_safetensors({}, length=2**40), "its header should have"),
    "header no JSON": ("a.safetensors", lambda g: raw_safetensors(b"{not json"), "damaged header"),
    "header deep": ("a.safetensors", lambda g: raw_safetensors(b'{"a":' + b"[" * 100_000), "damaged header"),
    "header without entries": ("a.safetensors", lambda g: raw_safetensors({}), "holds no tensors"),
    "unknown dtype": ("a.safetensors", lambda g: raw_safetensors(entry(dtype="F12"), bytes(8)), "damaged header"),
    "negative shape": ("a.safetensors", lambda g: raw_safetensors(entry(shape=(-2,)), bytes(8)), "damaged header"),
    "shape of words": ("a.safetensors", lambda g: raw_safetensors(entry(shape="two"), bytes(8)), "damaged header"),
    "shape too large": ("a.safetensors", lambda g: raw_safetensors(entry(shape=(2**40, 2**40)), bytes(8)), "damaged header"),
    "offsets that lie": ("a.safetensors", lambda g: raw_safetensors(entry(offsets=(0, 4)), bytes(8)), "damaged header"),
    "entry no dict": ("a.safetensors", lambda g: raw_safetensors({"a": [1]}), "damaged header"),
    "web page": ("a.ckpt", lambda g: b"<!DOCTYPE html><html>Not found</html>", "is a web page"),
    "Git LFS note": ("a.safetensors", lambda g: b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 1670875648\n", "is a Git LFS note"),
    "picture": ("a.ckpt", lambda g: b"\x89PNG\r\n\x1a\n" + bytes(50), "is a picture"),
    "gzip": ("a.ckpt", lambda g: gzip.compress(b"weights"), "is a compressed archive"),
    "GGUF": ("a.ckpt", lambda g: b"GGUF" + bytes(50), "is a GGUF file"),
    "JSON": ("a.ckpt", lambda g: b'{"a": 1, "b": 2}', "is a text file in JSON"),
    "text": ("a.ckpt", lambda g: b"hello, this is no checkpoint", "begins with b'hello"),
    "pickle under another name": ("a.safetensors", lambda g: g["ckpt"], "is a pickle under the name of a safetensors file")}

HOTSHOT, SPARSE = KINDS["HotshotXL motion module"], KINDS["SparseCtrl RGB"]
OBJECTS: dict[str, tuple[Callable, str]] = {
    **{kind: (lambda w, mark, k=kind: {n: torch.zeros(s) for n, s in KINDS[k].items()}, kind.removeprefix("something else: "))
       for kind in KINDS if kind not in ("AnimateLCM motion module", "whole-UNet training checkpoint", "something else: a text encoder")},
    "empty dict": (lambda w, mark: {}, "holds no tensors"),
    "a list": (lambda w, mark: list(w.values()), "holds a list"),
    "one tensor": (lambda w, mark: torch.zeros(3), "holds a Tensor"),
    "wrapped in itself": (lambda w, mark: (d := {}, d.update(state_dict=d))[0], "holds no tensors"),
    "optimizer state": (lambda w, mark: {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}, "holds no tensors"),
    "one weight missing": (lambda w, mark: {n: t for n, t in w.items() if n != FIRST}, "lacks the weight down_blocks.0"),
    "a block missing": (lambda w, mark: {n: t for n, t in w.items() if not n.startswith("up_blocks.1")}, "lacks the weight up_blocks.1"),
    "only the way up": (lambda w, mark: {n: t for n, t in w.items() if n.startswith("up_blocks")}, "no motion module in down_blocks"),
    "an unknown weight": (lambda w, mark: w | {f"{MODULE}.gate": torch.zeros(1)}, "has the unknown weight .*gate"),
    "a weight outside": (lambda w, mark: w | {"conv_in.weight": torch.zeros(32, 4, 3, 3)}, "has the unknown weight conv_in.weight"),
    "transposed": (change(f"{MODULE}.transformer_blocks.0.ff.net.2.weight", lambda t: t.T.contiguous()), "has in a wrong shape"),
    "too wide": (change(FIRST, lambda t: torch.zeros(33)), "wrong shape|lacks|can be built"),
    "a number": (change(FIRST, lambda t: torch.tensor(1.0)), "wrong shape"),
    "one table longer": (change(PE, lambda t: torch.cat([t, t], dim=1)), "wrong shape"),
    "one table missing": (lambda w, mark: {n: t for n, t in w.items() if n != PE}, "lacks the weight .*pos_encoder"),
    "two different tables": (change(PE, lambda t: t + 1), "two different position encodings"),
    "NaN": (change(FIRST, lambda t: t * math.nan), "has NaN or infinity in"),
    "one infinity": (change(FIRST, lambda t: t.clone().index_fill_(0, torch.tensor([3]), math.inf)), "has NaN or infinity in"),
    "NaN in a table": (lambda w, mark: {n: t * math.nan if n.endswith(".pe") else t for n, t in w.items()}, "has NaN or infinity in"),
    "whole numbers": (change(FIRST, lambda t: t.to(torch.int8)), "in int8"),
    "complex numbers": (change(FIRST, lambda t: t.to(torch.complex64)), "in complex64"),
    "sparse tensor": (change(FIRST, lambda t: t.to_sparse()), "claims more numbers|damaged pickle"),
    "more numbers than bytes": (change(FIRST, lambda t: torch.zeros(1).expand(10**12)), "claims more numbers than the file holds"),
    "a norm that does not exist": (lambda w, mark: {"state_dict": w, "animatediff_config": {"motion_norm": "sideways"}}, "sideways"),
    "heads that do not divide": (lambda w, mark: {"state_dict": w, "animatediff_config": {"motion_num_attention_heads": 7}}, "7 heads"),
    "heads of words": (lambda w, mark: {"state_dict": w, "animatediff_config": {"motion_num_attention_heads": "many"}}, "can be built"),
    "runs os.system": (lambda w, mark: w | {"x": Runs(os.system, f"touch {mark}")}, "asks to run posix.system|asks to run nt.system"),
    "runs eval": (lambda w, mark: {"state_dict": w, "epoch": Runs(eval, f"open({str(mark)!r}, 'w')")}, "asks to run eval"),
    "runs exec in the config": (lambda w, mark: {"state_dict": w, "animatediff_config": Runs(exec, f"open({str(mark)!r}, 'w')")}, "asks to run exec"),
    "runs open": (lambda w, mark: w | {"x": Runs(open, str(mark), "w")}, "asks to run (io|_io).open"),
    "runs a method of ours": (lambda w, mark: w | {"x": Runs(Path.touch, mark)}, "asks to run")}


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    save_file({n: t.clone() for n, t in tiny.items()}, folder / "safetensors")
    torch.save(tiny, folder / "ckpt")
    torch.save(tiny, folder / "legacy", _use_new_zipfile_serialization=False)
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def refused(path: Path, words: str) -> None:
    "One sentence that names the file, says what was found and what is needed; nothing is written and nothing has run."
    before = sorted(path.parent.rglob("*"))
    with pytest.raises((ValueError, NotImplementedError), match=words) as caught: load_motion_module(path)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said and ": " in said and said.endswith(".") and len(said) < 600, said
    assert sorted(path.parent.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("case", BYTES)
def test_bad_bytes(case, good, tmp_path):
    name, make, words = BYTES[case]
    (tmp_path / name).write_bytes(make(good))
    refused(tmp_path / name, words)


@pytest.mark.parametrize("case", OBJECTS)
def test_bad_contents(case, tiny, tmp_path):
    make, words = OBJECTS[case]
    torch.save(make(tiny, tmp_path / "MARK"), tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", words)
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickle_is_not_run(protocol, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"x": Runs(os.system, f"touch {tmp_path / 'MARK'}")}, protocol))
    refused(tmp_path / "a.ckpt", "pickle|begins with")
    assert not (tmp_path / "MARK").exists()


def test_legacy_pickle_is_not_run(tiny, tmp_path):
    torch.save(tiny | {"x": Runs(os.system, f"touch {tmp_path / 'MARK'}")}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.ckpt", "asks to run")
    assert not (tmp_path / "MARK").exists()


def test_other_zip_files(tmp_path):
    as_zip(tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "is a damaged pickle, or none of PyTorch's")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.ckpt")
    refused(tmp_path / "script.ckpt", "is a damaged pickle, or none of PyTorch's")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "has a config and no weights"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{ not"), "is no readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "no dict"),
    "another class": (lambda f: (f / "config.json").write_text('{"_class_name": "AutoencoderKL"}'), "is the folder of a AutoencoderKL"),
    "an unknown UNet": (lambda f: (f / "config.json").write_text('{"_class_name": "UNetMotionModel", "down_block_types": ["Strange"]}'), "config that is not built here"),
    "other widths": (lambda f: rewrite(f, block_out_channels=[32, 96]), "wrong shape"),
    "more layers": (lambda f: rewrite(f, motion_layers_per_block=2), "lacks the weight"),
    "no middle": (lambda f: rewrite(f, use_motion_mid_block=False), "has the unknown weight mid_block"),
    "widths of words": (lambda f: rewrite(f, block_out_channels="wide"), "can be built"),
    "a norm of its own": (lambda f: rewrite(f, motion_norm="none"), "motion_norm is 'none'"),
    "half the weights": (lambda f: cut(f / "diffusion_pytorch_model.safetensors"), "is cut off")}


def rewrite(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder(case, adapter_folder, tmp_path):
    damage, words = FOLDERS[case]
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))
    damage(folder)
    refused(folder, words)


def test_pipeline_refuses_the_same(base, tiny, tmp_path):
    torch.save({n: t * math.nan for n, t in tiny.items()}, tmp_path / "nan.ckpt")
    torch.save(fill(original_spec((16, 64), True, 24, layers=1)), tmp_path / "narrow.ckpt")
    torch.save(tiny | {"x": Runs(os.system, f"touch {tmp_path / 'MARK'}")}, tmp_path / "runs.ckpt")
    for name, words in (("nan", "has NaN"), ("narrow", "made for block_out_channels .*narrow.ckpt"), ("runs", "asks to run")):
        with pytest.raises(ValueError, match=words) as caught: AnimationPipeline.from_pretrained(base, motion=tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "MARK").exists()


def test_there_are_forty():
    assert len(BYTES) + len(OBJECTS) + len(FOLDERS) >= 40
