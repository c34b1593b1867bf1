"""The UNet against diffusers, over randomly drawn configs: strict loads, outputs, conventions, gradients, bad input."""
from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from einops import rearrange
from torch import nn

from animatediff_lit.motion import MOTION_NORMS
from animatediff_lit.unet import PRESETS, UNet3DConditionModel, UNetConfig

FRAMES = (1, 4, 5, 16)
SEEDS = range(30)
TIMES = torch.tensor([10, 700])


# ---- random configs
def nested(rng: random.Random, layers: list[int]) -> list[Any]:
    "A depth for each block, in some blocks for each of its layers."
    return [[rng.choice([1, 2]) for _ in range(n)] if rng.random() < 0.5 else rng.choice([1, 2]) for n in layers]


def draw(seed: int) -> dict[str, Any]:
    "A config of `UNetMotionModel`, small enough to run in a moment."
    rng = random.Random(seed)
    n = rng.choice([2, 2, 3])
    widths = [rng.choice([16, 24, 32]) for _ in range(n)]
    down = [rng.choice(["CrossAttnDownBlockMotion", "DownBlockMotion"]) for _ in range(n)]
    up = [rng.choice(["CrossAttnUpBlockMotion", "UpBlockMotion"]) for _ in range(n)]
    layers = [rng.choice([1, 2]) for _ in range(n)] if rng.random() < 0.5 else [rng.choice([1, 2])] * n
    config = dict(
        block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=layers if len(set(layers)) > 1 else layers[0],
        norm_num_groups=rng.choice([2, 4, 8]), norm_eps=rng.choice([1e-5, 1e-6]), act_fn=rng.choice(["silu", "silu", "gelu", "mish", "relu"]),
        in_channels=rng.choice([4, 4, 9]), out_channels=rng.choice([4, 4, 3]), downsample_padding=rng.choice([1, 1, 0]),
        cross_attention_dim=rng.choice([12, 16]), use_linear_projection=rng.random() < 0.5, use_motion_mid_block=rng.random() < 0.5,
        num_attention_heads=rng.choice([2, [rng.choice([1, 2, 4]) for _ in range(n)]]), motion_max_seq_length=rng.choice([16, 24, 32]),
        motion_num_attention_heads=rng.choice([2, [rng.choice([1, 2, 4]) for _ in range(n)]]),
        mid_block_layers=rng.choice([1, 1, 2]), mid_block_scale_factor=rng.choice([1.0, 1.0, 1.5]),
        time_cond_proj_dim=rng.choice([None, None, 6]))
    for name in ("transformer_layers_per_block", "temporal_transformer_layers_per_block"):
        kind = rng.choice(["one", "each", "own way up", "layer by layer"])
        if kind != "one": config[name] = [rng.choice([1, 2]) for _ in range(n)]
        if kind == "own way up": config[f"reverse_{name}"] = [rng.choice([1, 2]) for _ in range(n)]
        if kind == "layer by layer":
            config[name], config[f"reverse_{name}"] = nested(rng, layers), nested(rng, [k + 1 for k in reversed(layers)])
    if rng.random() < 0.3: config["transformer_layers_per_mid_block"] = 2
    if rng.random() < 0.3: config["temporal_transformer_layers_per_mid_block"] = 2
    if rng.random() < 0.3:
        config |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10)
    silent = [i for i in range(n - 1) if "Cross" not in down[i] + up[n - 1 - i]]          # no text is read at these resolutions
    if silent: config["cross_attention_dim"] = [20 if i in silent else 16 for i in range(n)]
    return config


SDXL_LIKE = dict(block_out_channels=[16, 32, 32], down_block_types=["DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"],
                 up_block_types=["CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"], layers_per_block=2, norm_num_groups=8,
                 cross_attention_dim=16, transformer_layers_per_block=[1, 2, 3], num_attention_heads=[1, 2, 4], motion_num_attention_heads=2,
                 use_linear_projection=True, use_motion_mid_block=False, addition_embed_type="text_time", addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=6 * 8 + 10)
CONFIGS = {f"drawn {seed}": draw(seed) for seed in SEEDS} | {"like SDXL": SDXL_LIKE}


def test_the_sweep_covers_what_it_should():
    drawn = [CONFIGS[f"drawn {seed}"] for seed in SEEDS]
    assert len(drawn) >= 25
    for name in ("layers_per_block", "num_attention_heads", "motion_num_attention_heads", "cross_attention_dim", "transformer_layers_per_block",
                 "temporal_transformer_layers_per_block"):
        assert len({isinstance(c.get(name, 1), list) for c in drawn}) == 2, name
    for name in ("in_channels", "out_channels", "downsample_padding", "use_linear_projection", "use_motion_mid_block", "motion_max_seq_length",
                 "addition_embed_type", "mid_block_layers", "mid_block_scale_factor", "time_cond_proj_dim", "act_fn"):
        assert len({c.get(name) for c in drawn}) > 1, name
    for name in ("transformer_layers_per_block", "temporal_transformer_layers_per_block"):
        assert any(f"reverse_{name}" in c for c in drawn) and any(isinstance(d, list) for c in drawn if name in c for d in c[name]), name
    for kind in ("CrossAttnDownBlockMotion", "DownBlockMotion"): assert any(c["down_block_types"][0] == kind for c in drawn)


# ---- both models, and what they are fed
def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    "Noise on every parameter and buffer, as after training: nothing is zero or one any more, the position encodings neither."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()): t += 0.05 * torch.randn(t.shape, generator=generator)
    return module


def pair(config: dict[str, Any], **ours: Any) -> tuple[UNetMotionModel, UNet3DConditionModel]:
    torch.manual_seed(0)
    reference = shake(UNetMotionModel(**config)).eval()
    unet = UNet3DConditionModel.from_config(reference.config, **ours).eval()
    unet.load_state_dict(reference.state_dict(), strict=True)
    return reference, unet


def feed(config: UNetConfig, frames: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict]:
    "Sample, text, and the rest as keywords."
    generator = torch.Generator().manual_seed(seed)
    def rand(*shape): return torch.randn(shape, generator=generator)
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[-1]
    rest: dict[str, Any] = {}
    if config.addition_embed_type: rest["added_cond_kwargs"] = dict(text_embeds=rand(2, 10), time_ids=rand(2, 6).abs() * 100)
    if config.time_cond_proj_dim: rest["timestep_cond"] = rand(2, config.time_cond_proj_dim)
    return rand(2, config.in_channels, frames, *size), rand(2, 7, width), rest


@torch.no_grad()
def outputs(reference: UNetMotionModel, unet: UNet3DConditionModel, frames: int, size: tuple[int, int] = (8, 8), time: Any = TIMES) -> tuple[torch.Tensor, torch.Tensor]:
    sample, text, rest = feed(unet.config, frames, size)
    return unet(sample, time, text, **rest), reference(sample, time, text.repeat_interleave(frames, dim=0), **rest).sample


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((ours - wanted).norm() / wanted.norm()).item()


# ---- parity
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name):
    reference, unet = pair(CONFIGS[name])
    for frames, size in zip(FRAMES, [(8, 8), (7, 9), (8, 8), (8, 6)]):
        ours, wanted = outputs(reference, unet, frames, size)
        assert ours.shape == wanted.shape and relative(ours, wanted) < 1e-5, f"{frames} frames of {size}"


@pytest.mark.parametrize("time", [7, 7.5, torch.tensor(7), torch.tensor([7.5]), TIMES], ids=repr)
def test_every_kind_of_timestep(time):
    assert relative(*outputs(*pair(CONFIGS["drawn 0"]), frames=4, time=time)) < 1e-5


def test_training_mode_computes_the_same():
    reference, unet = pair(CONFIGS["drawn 1"])
    trained = outputs(reference.train(), unet.train(), frames=4)
    assert relative(*trained) < 1e-5
    torch.testing.assert_close(outputs(reference, unet.eval(), frames=4)[0], trained[0])


def statistics_of_one_frame(norm: nn.GroupNorm):
    return lambda x: torch.stack([F.group_norm(frame, norm.num_groups, norm.weight, norm.bias, norm.eps) for frame in x.unbind(2)], 2)


def statistics_of_all_frames(norm: nn.GroupNorm, frames: int):
    def forward(x: torch.Tensor) -> torch.Tensor:
        video = rearrange(x, "(b f) c h w -> b c f h w", f=frames)
        return rearrange(F.group_norm(video, norm.num_groups, norm.weight, norm.bias, norm.eps), "b c f h w -> (b f) c h w")
    return forward


def patch(reference: UNetMotionModel, motion_norm: str, frames: int) -> UNetMotionModel:
    "diffusers' network with the GroupNorms of the original: v2 and v3 ('per_frame'), or v1."
    for name, module in reference.named_modules():
        if not isinstance(module, nn.GroupNorm): continue
        if "motion_modules." in name: module.forward = statistics_of_one_frame(module)
        elif motion_norm == "v1" and "attentions." not in name: module.forward = statistics_of_all_frames(module, frames)
    return reference


@pytest.mark.parametrize("motion_norm", ["per_frame", "v1"])
@pytest.mark.parametrize("name", ["drawn 2", "drawn 3", "like SDXL"])
def test_the_other_conventions(name, motion_norm):
    for frames in (1, 4, 5):
        reference, unet = pair(CONFIGS[name], motion_norm=motion_norm)
        before = relative(*outputs(reference, unet, frames))
        assert relative(*outputs(patch(reference, motion_norm, frames), unet, frames)) < 1e-5
        assert (before > 1e-3) == (frames > 1)                                   # unpatched, the reference is another model


# ---- an image model and a motion adapter
IMAGES = {
    "attention outside": dict(down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], attention_head_dim=2),
    "attention inside": dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=[2, 4],
                             use_linear_projection=True, transformer_layers_per_block=[1, 2], layers_per_block=2),
    "text and size": dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=2,
                          addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10)}
ADAPTERS = {"with the middle": dict(motion_max_seq_length=24), "without": dict(use_motion_mid_block=False, motion_num_attention_heads=4, motion_transformer_layers_per_block=2)}


def image_model(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return shake(UNet2DConditionModel(**{**dict(block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, cross_attention_dim=16, sample_size=8), **IMAGES[name]})).eval()


@pytest.mark.parametrize("adapter_name", ADAPTERS)
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_model_and_an_adapter(name, adapter_name):
    image = image_model(name)
    adapter = shake(MotionAdapter(**{**dict(block_out_channels=[16, 32], motion_layers_per_block=image.config.layers_per_block, motion_num_attention_heads=2,
                                            motion_norm_num_groups=8), **ADAPTERS[adapter_name]}))
    unet = UNet3DConditionModel.from_config(image.config, adapter.config).eval()
    unet.load_state_dict({**image.state_dict(), **adapter.state_dict()}, strict=True)
    reference = UNetMotionModel.from_unet2d(image, adapter).eval()
    if image.config.addition_embed_type: reference.add_embedding.load_state_dict(image.add_embedding.state_dict())      # from_unet2d forgets these
    for frames in (1, 5): assert relative(*outputs(reference, unet, frames)) < 1e-5
    assert unet.config.motion_max_seq_length == adapter.config.motion_max_seq_length


@pytest.mark.parametrize("motion_norm", MOTION_NORMS)
@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_new_motion_modules_leave_the_image_model(name, motion_norm):
    image = image_model(name)
    unet = UNet3DConditionModel.from_config(image.config, motion_norm=motion_norm).eval()
    missing, unexpected = unet.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected and missing and all("motion_modules." in key for key in missing)
    sample, text, rest = feed(unet.config, 5)
    alone = torch.stack([image(frame, TIMES, text, **rest).sample for frame in sample.unbind(2)], 2)
    if motion_norm == "v1": assert relative(unet(sample, TIMES, text, **rest), alone) > 1e-2      # its ResNet blocks mix the frames
    else: assert relative(unet(sample, TIMES, text, **rest), alone) < 1e-6
    torch.testing.assert_close(unet(sample[:, :, :1], TIMES, text, **rest), alone[:, :, :1])


def test_missing_keys_mean_the_defaults_of_diffusers():
    with torch.device("meta"): reference, ours = UNetMotionModel(), UNet3DConditionModel.from_config({})
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    with torch.device("meta"): image, ours = UNet2DConditionModel(), UNet3DConditionModel.from_config({"_class_name": "UNet2DConditionModel"}, {})
    assert {k: v.shape for k, v in ours.state_dict().items() if "motion_modules." not in k} == {k: v.shape for k, v in image.state_dict().items()}


# ---- presets
SD15 = dict(cross_attention_dim=768, sample_size=64)
FULL = {"sd15-v1": (417_137_600, {**SD15, "use_motion_mid_block": False, "motion_max_seq_length": 24}), "sd15-v2": (453_209_280, SD15),
        "sd15-v3": (417_137_600, {**SD15, "use_motion_mid_block": False}),
        "sdxl-beta": (236_779_200, dict(
            sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
            up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"), transformer_layers_per_block=(1, 2, 10), num_attention_heads=(5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, use_motion_mid_block=False))}


@pytest.mark.parametrize("name", FULL)
def test_full_size_presets(name):
    count, config = FULL[name]
    with torch.device("meta"): reference, unet = UNetMotionModel(**config), UNet3DConditionModel.from_preset(name)
    assert {k: v.shape for k, v in unet.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert sum(p.numel() for k, p in unet.named_parameters() if "motion_modules." in k) == count
    assert unet.config.motion_norm == {"sd15-v1": "v1", "sdxl-beta": "all_frames"}.get(name, "per_frame")


def test_nano():
    cfg = UNet3DConditionModel.from_preset("nano").config
    assert (cfg.sample_size, cfg.block_out_channels, cfg.layers_per_block, cfg.norm_num_groups, cfg.cross_attention_dim, cfg.motion_max_seq_length) == (8, (48, 64), 1, 8, 64, 32)
    assert (cfg.num_attention_heads, cfg.motion_num_attention_heads, cfg.use_motion_mid_block, cfg.motion_norm) == (4, 4, True, "all_frames")
    assert cfg.down_block_types == ("CrossAttnDownBlockMotion",) * 2 and cfg.up_block_types == ("CrossAttnUpBlockMotion",) * 2
    assert set(PRESETS) == {"nano", *FULL}


def test_a_config_builds_the_same_model_again():
    unet = UNet3DConditionModel(motion_context_dim=5, motion_norm="v1", use_motion_mid_block=False)
    again = UNet3DConditionModel.from_config(vars(unet.config))
    assert again.config == unet.config and again.state_dict().keys() == unet.state_dict().keys()


# ---- training and switches
@pytest.mark.parametrize("part", ["spatial", "motion", None])
def test_set_frozen(part):
    reference, unet = pair(CONFIGS["drawn 4"])
    sample, text, rest = feed(unet.config, 3)
    unet.set_frozen("motion").set_frozen(part)(sample, TIMES, text, **rest).square().mean().backward()
    learning = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {name for name, p in unet.named_parameters() if part is None or ("motion_modules." in name) == (part == "spatial")}


@torch.no_grad()
def test_set_motion():
    _, unet = pair(CONFIGS["drawn 5"])
    sample, text, rest = feed(unet.config, 5)
    moving = unet(sample, TIMES, text, **rest)
    alone = torch.cat([unet.set_motion(False)(sample[:, :, i:i + 1], TIMES, text, **rest) for i in range(5)], 2)
    torch.testing.assert_close(unet(sample, TIMES, text, **rest), alone)
    assert relative(unet.set_motion(True)(sample, TIMES, text, **rest), moving) == 0 < relative(alone, moving)


@torch.no_grad()
def test_a_batch_gives_what_its_members_give():
    for motion_norm in MOTION_NORMS:
        unet = shake(UNet3DConditionModel(motion_norm=motion_norm))
        sample, text, _ = feed(unet.config, 4)
        together = unet(sample, TIMES, text)
        for i in range(2): torch.testing.assert_close(unet(sample[i:i + 1], TIMES[i], text[i:i + 1]), together[i:i + 1])


@torch.no_grad()
def test_no_text_is_a_text_of_zeros():
    unet = shake(UNet3DConditionModel())
    sample, text, _ = feed(unet.config, 3)
    torch.testing.assert_close(unet(sample, 10), unet(sample, 10, torch.zeros_like(text)))
    assert relative(unet(sample, 10), unet(sample, 10, text)) > 1e-3


@torch.no_grad()
def test_motion_context():
    unet, plain = UNet3DConditionModel(motion_context_dim=6, motion_rank=3), UNet3DConditionModel()
    assert any(".context." in name for name in unet.state_dict()) and not any(".context." in name for name in plain.state_dict())
    sample, _, _ = feed(unet.config, 3)
    context = torch.randn(2, 7, 6)
    assert torch.equal(unet(sample, 10, motion_context=context), unet(sample, 10))
    shake(unet)
    assert relative(unet(sample, 10, motion_context=context), unet(sample, 10)) > 1e-4
    assert torch.equal(plain(sample, 10, motion_context=context), plain(sample, 10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_precisions(dtype):
    unet = shake(UNet3DConditionModel())
    sample, text, _ = feed(unet.config, 3)
    wanted = unet(sample, TIMES, text)
    out = unet.to(dtype)(sample.to(dtype), TIMES, text.to(dtype))
    assert out.dtype == dtype and relative(out.float(), wanted) < {torch.float64: 1e-5, torch.bfloat16: 0.1}[dtype]


# ---- bad input
SAMPLE, TEXT = torch.zeros(2, 4, 3, 8, 8), torch.zeros(2, 7, 768)


@pytest.mark.parametrize("call, message", [
    (lambda unet: unet(torch.zeros(2, 4, 33, 8, 8), 10), "33 frames but there are position encodings for 32"),
    (lambda unet: unet(torch.zeros(6, 4, 8, 8), 10), r"sample has shape \(6, 4, 8, 8\); this UNet takes \(batch, 4, frames, height, width\)"),
    (lambda unet: unet(torch.zeros(2, 3, 3, 8, 8), 10), r"sample has shape \(2, 3, 3, 8, 8\); this UNet takes \(batch, 4,"),
    (lambda unet: unet(SAMPLE, 10, torch.zeros(6, 7, 768)), r"encoder_hidden_states has shape \(6, 7, 768\); .* each of the 2 videos"),
    (lambda unet: unet(SAMPLE, 10, torch.zeros(2, 768)), r"encoder_hidden_states has shape \(2, 768\)"),
    (lambda unet: unet(SAMPLE, 10, torch.zeros(2, 7, 64)), "64 wide and this UNet takes 768"),
    (lambda unet: unet(SAMPLE, torch.arange(3), TEXT), "3 timesteps for a batch of 2 videos"),
    (lambda unet: unet.set_frozen("image"), "set_frozen got 'image'"),
    (lambda unet: UNet3DConditionModel(motion_context_dim=6)(SAMPLE, 10, motion_context=torch.zeros(6, 7, 6)), r"motion_context has shape \(6, 7, 6\)"),
    (lambda unet: UNet3DConditionModel(**{**SDXL_LIKE, "cross_attention_dim": 768})(SAMPLE, 10, TEXT), "needs added_cond_kwargs with 'text_embeds'"),
    (lambda unet: UNet3DConditionModel(num_attention_heads=5), "64 channels do not divide into 5 heads"),
    (lambda unet: UNet3DConditionModel(motion_num_attention_heads=5), "32 channels do not divide into 5 heads"),
    (lambda unet: UNet3DConditionModel(norm_num_groups=32, block_out_channels=(48, 64, 64)), "48 channels do not divide into 32 groups"),
    (lambda unet: UNet3DConditionModel(layers_per_block=(1, 2)), "layers_per_block has 2 values and 3 are needed"),
    (lambda unet: UNet3DConditionModel(block_out_channels=(32, 64)), "2 block_out_channels, 3 down_block_types and 3 up_block_types"),
    (lambda unet: UNet3DConditionModel(down_block_types=("AttnDownBlock2D",) * 3), "'AttnDownBlock2D' is not a block that is built here"),
    (lambda unet: UNet3DConditionModel(motion_norm="v2"), "motion_norm is 'v2': choose one of"),
    (lambda unet: UNet3DConditionModel(addition_embed_type="image"), "addition_embed_type is 'image'"),
    (lambda unet: UNet3DConditionModel.from_preset("sd2"), "'sd2' is not a preset: use one of nano, sd15-v1,"),
    (lambda unet: UNet3DConditionModel.from_config({"class_embed_type": "timestep"}), "asks for class_embed_type='timestep'; only None"),
    (lambda unet: UNet3DConditionModel.from_config({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}), "'SimpleCrossAttnDownBlockMotion' is not a block"),
    (lambda unet: UNet3DConditionModel.from_config({}, {"block_out_channels": [320, 640, 1280]}), r"made for block_out_channels \(320, 640, 1280\)"),
    (lambda unet: UNet3DConditionModel.from_config({}, {"motion_layers_per_block": 1}), "made for layers_per_block"),
])
def test_bad_values_get_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught: call(UNet3DConditionModel())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call, message", [
    (lambda: UNet3DConditionModel(channels=32, frames=16), "has no option channels, frames: its options are sample_size"),
    (lambda: UNet3DConditionModel.from_config("unet/config.json"), "this is a str"),
    (lambda: UNet3DConditionModel.from_config({}, 16), "this is a int"),
])
def test_bad_types_get_one_sentence(call, message):
    with pytest.raises(TypeError, match=message) as caught: call()
    assert "\n" not in str(caught.value)


def test_lists_of_false_ask_for_nothing():
    assert UNet3DConditionModel.from_config(image_model("attention outside").config | {"only_cross_attention": [False, False]})
