"""The pipeline: the same as diffusers', the same in a batch as alone, the same from the disk as saved, and plain about bad input."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from animatediff_lit import pipeline
from animatediff_lit.latents import decode_video, word_tokenizer, world_words
from animatediff_lit.pipeline import AnimationPipeline, denoise, draw_noise, guide, seeds_for
from animatediff_lit.unet import UNet3DConditionModel
from animatediff_lit.video import Video
from measure import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
PROMPTS = ["a red star moving left", "a blue circle growing on a dark background"]
QUICK = dict(num_inference_steps=3, video_length=5, progress=False)
TRAINED = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction")
DDIM = dict(**TRAINED, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
ALL_FRAMES = dict(block_out_channels=(16, 24), norm_num_groups=4, num_attention_heads=2, motion_num_attention_heads=4, cross_attention_dim=32,
                  layers_per_block=1, sample_size=4, motion_max_seq_length=12,
                  down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"))


def randomise(module: torch.nn.Module) -> None:
    "New weights everywhere, so that nothing stays at zero or one."
    g = torch.Generator().manual_seed(1)
    for p in module.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=g)


def make_pipe(**config) -> AnimationPipeline:
    "A small pipeline with random weights in every part."
    torch.manual_seed(0)
    tokenizer = word_tokenizer(world_words())
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                                        max_position_embeddings=tokenizer.model_max_length, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.5, sample_size=8,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    unet = UNet3DConditionModel(**{**ALL_FRAMES, **config})
    randomise(unet)
    return AnimationPipeline(unet, vae, text, tokenizer, diffusers.DDIMScheduler(**DDIM))


@pytest.fixture(scope="module")
def pipe() -> AnimationPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def ours(pipe):
    "The shared pipeline, with its scheduler as it was."
    scheduler = pipe.scheduler
    yield pipe
    pipe.scheduler = scheduler


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    "A copy of the folder to damage."
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def reference(path: Path) -> diffusers.AnimateDiffPipeline:
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(path)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.fixture(scope="module")
def loaded(folder) -> diffusers.AnimateDiffPipeline:
    return reference(folder)


@pytest.fixture
def theirs(loaded) -> diffusers.AnimateDiffPipeline:
    "diffusers' pipeline from the same folder, with a fresh scheduler."
    loaded.scheduler = diffusers.DDIMScheduler(**DDIM)
    return loaded


def equal_weights(a: AnimationPipeline, b: AnimationPipeline) -> None:
    for part in ("unet", "vae", "text_encoder"):
        x, y = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert list(x) == list(y)
        wrong = [name for name in x if x[name].dtype != y[name].dtype or not torch.equal(x[name], y[name])]
        assert not wrong, f"{part}: {wrong}"


def latents_of(pipe: AnimationPipeline, *args, **kwargs) -> torch.Tensor:
    "The clean latents behind a call."
    last = []
    pipe(*args, callback=lambda step, t, z: last.append(z), **kwargs)
    return last[-1]


# ---- guidance and noise
def test_guide():
    without, with_text = torch.randn(2, 3)
    assert torch.equal(guide(without, with_text, 0.0), without)
    torch.testing.assert_close(guide(without, with_text, 1.0), with_text)
    torch.testing.assert_close(guide(without, with_text, 7.5) - without, 7.5 * (with_text - without))


def test_seeds():
    assert seeds_for(3, 3) == [3, 4, 5] and seeds_for([7, 1], 2) == [7, 1]
    for bad in (-1, 1.5, "0", True, [1], [1, -2], None, 2 ** 63):
        with pytest.raises(ValueError, match="^seed is "): seeds_for(bad, 2)


def test_noise_of_a_clip_depends_on_its_seed_alone():
    together = draw_noise([torch.Generator().manual_seed(s) for s in (5, 6)], (4, 3, 2, 2))
    assert torch.equal(together[1], draw_noise([torch.Generator().manual_seed(6)], (4, 3, 2, 2))[0])
    assert torch.equal(together[0], torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(5))[0])


# ---- the same as diffusers
SCHEDULERS = ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
              "LCM", "PNDM", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DDPM", "TCD", "SASolver")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, ours, theirs):
    "From seeds to latents as in diffusers; repeatable; and in a batch, to the last bit, as alone."
    kind = getattr(diffusers, f"{name}Scheduler")
    ours.scheduler, theirs.scheduler = kind.from_config(ours.scheduler.config), kind.from_config(ours.scheduler.config)
    options = {**QUICK, "num_inference_steps": 5}                                                        # PNDM takes no fewer
    together = latents_of(ours, PROMPTS, seed=[4, 9], **options)
    for prompt, seed, one in zip(PROMPTS, (4, 9), together):
        assert torch.equal(one, latents_of(ours, prompt, seed=seed, **options)[0])
    generators = [torch.Generator().manual_seed(s) for s in (4, 9)]
    expected = theirs(PROMPTS, num_frames=5, num_inference_steps=5, guidance_scale=7.5, generator=generators, output_type="latent").frames
    assert expected.isfinite().all() and (together[0] - together[1]).abs().max() > 0.1
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("frames", [1, 4, 12])
def test_parity(name, scale, frames, ours, theirs):
    "The same frames as diffusers' own pipeline, within 1e-3 of full scale, from the same noise."
    kind = getattr(diffusers, f"{name}Scheduler")
    ours.scheduler, theirs.scheduler = kind.from_config(ours.scheduler.config), kind.from_config(ours.scheduler.config)
    compare(ours, theirs, frames, scale)


def compare(ours: AnimationPipeline, theirs: diffusers.AnimateDiffPipeline, frames: int, scale: float, steps: int = 4) -> None:
    size = ours.unet.config.sample_size
    noise = torch.randn(2, 4, frames, size, size, generator=torch.Generator().manual_seed(0))
    negative = ["", "a green moon"]
    options = dict(num_inference_steps=steps, guidance_scale=scale, latents=noise, negative_prompt=negative)
    expected = theirs(PROMPTS, num_frames=frames, output_type="pt", **options).frames                      # b f c h w, 0 to 1
    text, no_text = ours.encode_prompt(PROMPTS), ours.encode_prompt(negative)
    latents = denoise(ours.unet, ours.scheduler, noise, text, no_text if scale > 1 else None, steps, scale)
    decoded = theirs.video_processor.postprocess_video(theirs.decode_latents(latents), output_type="pt")
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded, expected, atol=1e-3, rtol=0)
    videos = ours(PROMPTS, video_length=frames, progress=False, **options)
    bytes_ = np.stack([v.frames for v in videos]).astype(int)
    difference = np.abs(bytes_ - (255 * expected).round().int().permute(0, 1, 3, 4, 2).numpy())
    assert difference.max() <= 1 and (difference > 0).mean() < 2e-3                                        # rounding to either side


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_nano_parity(name, scale):
    "The shipped nano in diffusers' pipeline."
    ours, theirs = AnimationPipeline.from_pretrained("nano"), reference(pipeline.NANO)
    kind = getattr(diffusers, f"{name}Scheduler")
    ours.scheduler, theirs.scheduler = kind.from_config(ours.scheduler.config), kind.from_config(ours.scheduler.config)
    compare(ours, theirs, 16, scale, steps=5)


def test_eta(ours, theirs):
    clean = latents_of(ours, PROMPTS[0], eta=1.0, seed=3, **QUICK)
    expected = theirs(PROMPTS[0], num_frames=5, num_inference_steps=3, eta=1.0, generator=torch.Generator().manual_seed(3), output_type="latent").frames
    torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)
    assert (clean - latents_of(ours, PROMPTS[0], seed=3, **QUICK)).abs().max() > 0.1
    ours.scheduler = diffusers.EulerDiscreteScheduler.from_config(ours.scheduler.config)
    with pytest.raises(ValueError, match="eta is 0.5 but EulerDiscreteScheduler has no eta"): ours(PROMPTS[0], eta=0.5, **QUICK)


# ---- a call
def test_result(pipe):
    video = pipe(PROMPTS[0], fps=5, height=12, width=20, **QUICK)
    assert isinstance(video, Video) and video.frames.shape == (5, 12, 20, 3) and video.fps == 5 and video.caption == PROMPTS[0]
    videos = pipe(PROMPTS[:1], **QUICK)
    assert isinstance(videos, list) and len(videos) == 1 and videos[0].frames.shape == (5, 8, 8, 3)
    assert pipe(PROMPTS[0], **{**QUICK, "video_length": 12}).frames.shape[0] == 12


@pytest.mark.parametrize("frames", [1, 5])
def test_batch_frames_are_those_of_the_members(frames, pipe):
    options = {**QUICK, "video_length": frames}
    together = pipe(PROMPTS, seed=2, negative_prompt=["a green moon", ""], **options)
    assert np.array_equal(together[0].frames, pipe(PROMPTS[0], seed=2, negative_prompt="a green moon", **options).frames)
    assert np.array_equal(together[1].frames, pipe(PROMPTS[1], seed=3, **options).frames)
    assert not np.array_equal(together[0].frames, together[1].frames)


@pytest.mark.parametrize("changed", [dict(seed=1), dict(negative_prompt="a green moon"), dict(guidance_scale=2.0), dict(guidance_scale=1.0), dict(num_inference_steps=4), dict(prompt=PROMPTS[1])],
                         ids=lambda d: "-".join(map(str, d.items())))
def test_everything_counts(changed, pipe):
    base = {"prompt": PROMPTS[0], **QUICK}
    assert not torch.equal(latents_of(pipe, **base), latents_of(pipe, **{**base, **changed}))


@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete"])
def test_given_latents(name, ours):
    "The seed's own noise handed in gives the seed's clip, also where the scheduler goes on drawing."
    ours.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(ours.scheduler.config)
    noise = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(8))
    kept = noise.clone()
    a = latents_of(ours, PROMPTS[0], seed=8, **QUICK)
    assert torch.equal(a, latents_of(ours, PROMPTS[0], seed=8, latents=noise, **QUICK)) and torch.equal(noise, kept)
    assert not torch.equal(a, latents_of(ours, PROMPTS[0], seed=8, latents=-noise, **QUICK))


def test_global_random_state_is_left_alone(pipe, folder):
    torch.manual_seed(5); expected = torch.randn(3)
    torch.manual_seed(5); pipe(PROMPTS[0], **QUICK); AnimationPipeline.from_pretrained(folder)
    assert torch.equal(torch.randn(3), expected)


def test_callback(pipe):
    seen = []
    pipe(PROMPTS, callback=lambda *a: seen.append(a), **QUICK)
    assert [(i, t) for i, t, _ in seen] == [(0, 999), (1, 666), (2, 332)] and all(z.shape == (2, 4, 5, 4, 4) for *_, z in seen)
    video = pipe(PROMPTS[0], callback=lambda i, t, z: torch.zeros_like(z) if i == 2 else None, **QUICK)
    assert np.array_equal(video.frames, decode_video(pipe.vae, torch.zeros(1, 4, 5, 4, 4))[0])
    with pytest.raises(ValueError, match=r"callback returned shape \(1, 4, 5, 4\)"): pipe(PROMPTS[0], callback=lambda i, t, z: z[..., 0], **QUICK)
    with pytest.raises(ValueError, match="callback returned bool"): pipe(PROMPTS[0], callback=lambda *a: True, **QUICK)


@pytest.mark.parametrize("scale, batch", [(7.5, 2), (1.01, 2), (1.0, 1), (0.0, 1), (-1, 1)])
def test_questions_per_step(scale, batch, pipe):
    asked = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    pipe(PROMPTS[0], guidance_scale=scale, **QUICK)
    hook.remove()
    assert asked == [batch] * 3


def test_progress(pipe, capsys):
    pipe(PROMPTS[0], **QUICK)
    assert capsys.readouterr().err == ""
    pipe(PROMPTS[0], **{**QUICK, "progress": True})
    assert "3/3" in capsys.readouterr().err


def test_nothing_is_trained(pipe):
    assert not any(m.training for m in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert not latents_of(pipe, PROMPTS[0], **QUICK).requires_grad


BAD_CALLS = [
    (dict(prompt=""), ValueError, "The prompt is empty"), (dict(prompt="  \n"), ValueError, "The prompt is empty"), (dict(prompt=["a red star", ""]), ValueError, "The prompt is empty"),
    (dict(prompt=[]), ValueError, "The list of prompts is empty"), (dict(prompt=None), TypeError, "A prompt is None"), (dict(prompt=["a red star", 7]), TypeError, "A prompt is 7"),
    (dict(prompt="a red dragon"), ValueError, "dragon"), (dict(prompt="a red star " * 9), ValueError, "the text encoder reads 14"),
    (dict(negative_prompt=3), TypeError, "negative_prompt is 3"), (dict(negative_prompt=["", ""]), ValueError, "2 negative prompts for 1"), (dict(negative_prompt="a dragon"), ValueError, "dragon"),
    (dict(video_length=13), ValueError, "video_length is 13: there are position encodings for 12 frames"), (dict(video_length=0), ValueError, "video_length is 0"),
    (dict(video_length=2.0), TypeError, "video_length is 2.0"), (dict(video_length=True), TypeError, "video_length is True"),
    (dict(timesteps=[]), ValueError, "timesteps is \\[\\]: give a list of whole numbers from 999 down to 0"), (dict(timesteps=[5, 5]), ValueError, "each smaller than the one before"),
    (dict(timesteps=[1000, 5]), ValueError, "A timestep is 1000"), (dict(timesteps=[9.5]), TypeError, "A timestep is 9.5"), (dict(timesteps=4), TypeError, "timesteps is 4: give a list"),
    (dict(timesteps=[999, 499]), ValueError, "DDIMScheduler does not take timesteps of your own: "),
    (dict(num_inference_steps=0), ValueError, "num_inference_steps is 0"), (dict(num_inference_steps=1001), ValueError, "from 1 to 1000"), (dict(num_inference_steps=2.5), TypeError, "num_inference_steps is 2.5"),
    (dict(guidance_scale=float("nan")), ValueError, "guidance_scale is nan"), (dict(guidance_scale="7"), TypeError, "guidance_scale is '7'"), (dict(guidance_scale=None), TypeError, "guidance_scale is None"),
    (dict(eta=2.0), ValueError, "eta is 2.0"), (dict(fps=0), ValueError, "fps is 0"), (dict(fps="8"), TypeError, "fps is '8'"), (dict(callback=3), TypeError, "callback is 3"),
    (dict(seed=-1), ValueError, "seed is -1"), (dict(seed=[0, 1]), ValueError, "a list of 1"), (dict(seed="x"), ValueError, "seed is 'x'"),
    (dict(height=7), ValueError, "height is 7: give pixels, a multiple of 2"), (dict(width=0), ValueError, "width is 0"), (dict(width=8.0), TypeError, "width is 8.0"),
    (dict(latents=torch.zeros(1, 4, 4, 4, 4)), ValueError, r"latents has shape \(1, 4, 4, 4, 4\).*\(1, 4, 5, 4, 4\)"), (dict(latents=[1]), TypeError, "latents is a list"),
    (dict(latents=torch.zeros(1, 4, 5, 4, 4).long()), TypeError, "latents is a torch.int64"), (dict(latents=torch.full((1, 4, 5, 4, 4), float("nan"))), ValueError, "latents contains NaN"),
    (dict(latents=torch.full((1, 4, 5, 4, 4), float("inf"))), ValueError, "latents contains NaN or infinity"),
]


@pytest.mark.parametrize("bad, kind, says", BAD_CALLS, ids=[f"{list(b)[0]}-{i}" for i, (b, _, _) in enumerate(BAD_CALLS)])
def test_bad_input_before_any_work(bad, kind, says, pipe):
    worked = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: worked.append(1))
    with pytest.raises(kind, match=says) as caught: pipe(**{"prompt": PROMPTS[0], **QUICK, **bad})
    hook.remove()
    assert type(caught.value) is kind and "\n" not in str(caught.value) and not worked


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, None, diffusers.FlowMatchEulerDiscreteScheduler()], ids=["class", "none", "flow"])
def test_bad_scheduler(scheduler, ours):
    ours.scheduler = scheduler
    with pytest.raises(TypeError, match="^The scheduler is "): ours(PROMPTS[0], **QUICK)


@pytest.mark.parametrize("name, steps", [("PNDM", 2), ("LCM", 60)])
def test_steps_that_the_scheduler_does_not_take(name, steps, ours):
    ours.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(ours.scheduler.config)
    with pytest.raises(ValueError, match=f"^{name}Scheduler does not take {steps} steps: ") as caught: ours(PROMPTS[0], **{**QUICK, "num_inference_steps": steps})
    assert "\n" not in str(caught.value)


def test_nan_on_the_way(ours):
    with pytest.raises(FloatingPointError, match="became NaN"):
        ours(PROMPTS[0], callback=lambda i, t, z: z * float("nan"), **QUICK)


def test_no_size_known():
    with pytest.raises(ValueError, match="give a height in pixels"): make_pipe(sample_size=None)(PROMPTS[0], **QUICK)


# ---- on the disk
@pytest.mark.parametrize("config", [{}, dict(motion_norm="per_frame"), dict(motion_norm="v1"), dict(use_motion_mid_block=False), dict(num_attention_heads=(2, 4), motion_num_attention_heads=(2, 4)),
                                    dict(use_linear_projection=True, layers_per_block=2), dict(sample_size=None)], ids=str)
def test_round_trip(config, tmp_path):
    "Bit for bit, with the same options, and the same clip."
    pipe = make_pipe(**config)
    again = AnimationPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "model"))
    equal_weights(pipe, again)
    assert again.unet.config == pipe.unet.config and dict(again.scheduler.config).items() <= dict(pipe.scheduler.config).items()
    options = dict(height=8, width=8, **QUICK)
    assert np.array_equal(pipe(PROMPTS[0], **options).frames, again(PROMPTS[0], **options).frames)


def test_diffusers_reads_what_we_save(pipe, theirs):
    weights = theirs.unet.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in pipe.unet.state_dict().items())
    torch.testing.assert_close(theirs.encode_prompt(PROMPTS, "cpu", 1, False)[0], pipe.encode_prompt(PROMPTS))


def test_layout(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "AnimateDiffPipeline" and index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert any(name.endswith("pos_embed.pe") for name in load_file(folder / "motion_adapter" / "diffusion_pytorch_model.safetensors"))
    for file in folder.rglob("*"):
        if file.is_file(): assert file.stat().st_mode & 0o444 == 0o444, f"{file} cannot be read by everyone"
        if file.suffix == ".json": assert str(folder.parent.parent) not in file.read_text(), f"{file} names a folder of this machine"


def test_saving_again_names_no_folder(folder, tmp_path):
    again = AnimationPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    named = [f for f in again.rglob("*.json") if str(folder) in f.read_text()]
    assert not named


def test_half(pipe, tmp_path):
    again = AnimationPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "half", half=True))
    files = list((tmp_path / "half").rglob("*.safetensors"))
    assert len(files) == 4 and all(w.dtype == torch.float16 for f in files for w in load_file(f).values() if w.is_floating_point())
    for name, w in pipe.unet.state_dict().items(): assert torch.equal(w.half().float(), again.unet.state_dict()[name])
    assert np.abs(again(PROMPTS[0], **QUICK).frames.astype(int) - pipe(PROMPTS[0], **QUICK).frames).max() <= 8
    assert reference(tmp_path / "half")(PROMPTS[0], num_frames=3, num_inference_steps=1, output_type="np").frames.shape == (1, 3, 8, 8, 3)


def test_other_motion(folder, tmp_path):
    "`motion` takes a pipeline folder or the folder of an adapter, and changes the motion modules alone."
    other = make_pipe()
    for name, p in other.unet.named_parameters():
        if "motion_modules." in name: p.data.mul_(0.5)
    path = other.save_pretrained(tmp_path / "other")
    first = AnimationPipeline.from_pretrained(folder).unet.state_dict()
    for motion in (path, path / "motion_adapter"):
        mixed = AnimationPipeline.from_pretrained(folder, motion=motion).unet.state_dict()
        assert all(torch.equal(w, (other.unet.state_dict() if "motion_modules." in name else first)[name]) for name, w in mixed.items())


def test_image_model_needs_motion(copied, folder):
    shutil.move(copied / "motion_adapter", copied.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no motion_adapter, so it is an image model: name one with motion="): AnimationPipeline.from_pretrained(copied)
    equal_weights(AnimationPipeline.from_pretrained(copied, motion=copied.parent / "elsewhere"), AnimationPipeline.from_pretrained(folder))
    with pytest.raises(FileNotFoundError, match="holds no motion adapter"): AnimationPipeline.from_pretrained(folder, motion=copied / "scheduler")


def test_adapter_that_does_not_fit(folder, tmp_path):
    other = make_pipe(block_out_channels=(16, 32)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="^The motion adapter was made for block_out_channels"): AnimationPipeline.from_pretrained(folder, motion=other)
    other = make_pipe(norm_num_groups=8, use_motion_mid_block=False).save_pretrained(tmp_path / "no middle")
    config = other / "motion_adapter" / "config.json"
    config.write_text(config.read_text().replace('"use_motion_mid_block": false', '"use_motion_mid_block": true'))
    with pytest.raises(ValueError, match="motion_adapter could not be read: the file lacks the weight mid_block"): AnimationPipeline.from_pretrained(folder, motion=other)


@pytest.mark.parametrize("part", ["unet", "motion_adapter", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "one weight missing", "no file"])
def test_damaged_weights(part, damage, copied):
    file = next((copied / part).glob("*.safetensors"))
    if damage == "truncated": file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty": file.write_bytes(b"")
    elif damage == "no file": file.unlink()
    else:
        weights = load_file(file)
        weights.pop(next(name for name in weights if name.endswith("weight")))
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} could not be read: ") as caught: AnimationPipeline.from_pretrained(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "motion_adapter", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_damaged_config(part, copied):
    for file in (copied / part).glob("*.json"): file.write_text("{ not json")
    with pytest.raises(ValueError, match="could not be read: ") as caught: AnimationPipeline.from_pretrained(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part(part, copied):
    shutil.rmtree(copied / part)
    with pytest.raises(FileNotFoundError, match=f"copy lacks {part}: a pipeline folder holds"): AnimationPipeline.from_pretrained(copied)


def test_nano_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "NANO", tmp_path)
    with pytest.raises(FileNotFoundError, match="^The package's own nano lacks unet, vae"): AnimationPipeline.from_pretrained("nano")


def test_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder "): AnimationPipeline.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="There is no folder "): AnimationPipeline.from_pretrained("")
    with pytest.raises(FileNotFoundError, match="runs/nano is no folder here, and no model of that name could be fetched"): AnimationPipeline.from_pretrained("runs/nano")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file: give the folder"): AnimationPipeline.from_pretrained(tmp_path / "file")


def test_hub_id(monkeypatch, folder, pipe):
    import huggingface_hub
    asked = {}
    def download(repo_id, allow_patterns): asked[repo_id] = allow_patterns; return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    equal_weights(AnimationPipeline.from_pretrained("someone/some-model"), pipe)
    assert list(asked) == ["someone/some-model"] and "unet/diffusion_pytorch_model.safetensors" in asked["someone/some-model"]
    assert not any(p.endswith((".bin", ".ckpt", "*")) for p in asked["someone/some-model"])


def test_sdxl_is_refused(copied):
    config = json.loads((copied / "unet" / "config.json").read_text())
    (copied / "unet" / "config.json").write_text(json.dumps(config | {"addition_embed_type": "text_time"}))
    with pytest.raises(NotImplementedError, match="SDXL"): AnimationPipeline.from_pretrained(copied)


def test_image_to_video_adapter_is_refused(copied):
    adapter = copied / "motion_adapter"
    config = json.loads((adapter / "config.json").read_text())
    diffusers.MotionAdapter.from_config(config | {"conv_in_channels": 9, "block_out_channels": [320, 24]}).save_pretrained(adapter)      # as diffusers: 320 wide
    with pytest.raises(NotImplementedError, match="image-to-video"): AnimationPipeline.from_pretrained(copied)


def test_loading_stays_off_the_network(folder):
    code = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from measure import stay_offline
sys.addaudithook(stay_offline)
from animatediff_lit.pipeline import AnimationPipeline
AnimationPipeline.from_pretrained({str(folder)!r})"""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_saving_over(pipe, copied):
    "A pipeline folder is replaced and what else lay in it stays; any other folder is left alone."
    (copied / "README.md").write_text("a card")
    save = pipe.save_pretrained(copied)
    assert (save / "README.md").read_text() == "a card" and sorted(p.name for p in copied.parent.iterdir()) == ["copy"]
    equal_weights(AnimationPipeline.from_pretrained(copied), pipe)
    (copied.parent / "thesis").mkdir(); (copied.parent / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no pipeline folder"): pipe.save_pretrained(copied.parent / "thesis")
    with pytest.raises(FileExistsError, match="is a file"): pipe.save_pretrained(copied / "README.md")
    assert (copied.parent / "thesis" / "thesis.txt").read_text() == "mine"


def test_failed_save_changes_nothing(ours, copied, monkeypatch):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    def full(*args, **kwargs): raise OSError("No space left on device")
    monkeypatch.setattr(ours.vae, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"): ours.save_pretrained(copied)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before and [p.name for p in copied.parent.iterdir()] == ["copy"]


def test_what_diffusers_has_no_place_for(tmp_path):
    with pytest.raises(ValueError, match="does not fit into diffusers' MotionAdapter"): make_pipe(motion_context_dim=8).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_scheduler_is_saved(ours, tmp_path):
    ours.scheduler = diffusers.EulerDiscreteScheduler.from_config(ours.scheduler.config)
    again = AnimationPipeline.from_pretrained(ours.save_pretrained(tmp_path / "euler"))
    assert isinstance(again.scheduler, diffusers.EulerDiscreteScheduler)


def test_half_precision_runs(folder):
    pipe = AnimationPipeline.from_pretrained(folder).to(torch.bfloat16)
    assert pipe(PROMPTS[0], **QUICK).frames.shape == (5, 8, 8, 3)
