"Frames to latents and back, and text to vectors: against diffusers and transformers, and what bad input is told."
from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL
from einops import rearrange
from transformers import AutoTokenizer, CLIPTextModel

import animatediff_lit
from animatediff_lit.latents import check_words, decode_video, encode_text, encode_video, nano_autoencoder, nano_text_encoder, to_uint8, word_tokenizer, world_words
from animatediff_lit.video import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

NANO = Path(animatediff_lit.__file__).parent / "weights" / "nano"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(NANO, subfolder="vae").eval()


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(NANO / "text_encoder").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(world_words())


def clips(n: int, seed: int) -> torch.Tensor:
    "`n` random scenes as uint8 `(n, f, h, w, 3)`."
    rng = np.random.default_rng(seed)
    return torch.stack([torch.from_numpy(np.asarray(Scene.random(rng).render())) for _ in range(n)])


def as_input(frames: torch.Tensor) -> torch.Tensor:
    return rearrange(frames, "b f h w c -> b c f h w").float() / 127.5 - 1


# ---- golden: what the shipped weights were trained with
def test_token_ids():
    "They are baked into the shipped text encoder."
    tokenizer = word_tokenizer(world_words())
    assert tokenizer("a red star moving left").input_ids == [0, 3, 26, 32, 20, 17, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 1, 2)
    assert len(tokenizer) == 37 and tokenizer.model_max_length == 16


def test_shipped_tokenizer_is_ours(tokenizer):
    shipped = AutoTokenizer.from_pretrained(NANO / "tokenizer")
    assert shipped.get_vocab() == tokenizer.get_vocab() and shipped.model_max_length == tokenizer.model_max_length
    for text in ["", "A red STAR, moving-left!", "a crimson star", "  blue   moon ", *(f"a {c} {s} {m} on a {b} background" for c in COLOURS for s in SHAPES for m in MOTIONS for b in BACKGROUNDS)]:
        options = dict(padding="max_length", max_length=16, truncation=True)
        assert shipped(text, **options).input_ids == tokenizer(text, **options).input_ids


def test_new_models_take_the_shipped_weights(vae, text_encoder, tokenizer):
    nano_autoencoder().load_state_dict(vae.state_dict(), strict=True)
    nano_text_encoder(tokenizer).load_state_dict(text_encoder.state_dict(), strict=True)
    new, old = nano_text_encoder(tokenizer).config.to_dict(), text_encoder.config.to_dict()
    differ = {k for k in new if new[k] != old.get(k)} - {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert not differ


def test_every_caption_of_the_world_is_known(tokenizer):
    for colour in COLOURS:
        for motion in MOTIONS: check_words(tokenizer, Scene(colour, "star", motion, "dark").caption)


# ---- the shipped autoencoder
def test_scaled_latents_have_unit_variance(vae):
    assert abs(encode_video(vae, as_input(clips(64, seed=11))).std().item() - 1) < 0.08


def test_pictures_come_back(vae):
    true = clips(12, seed=12)
    made = torch.from_numpy(decode_video(vae, encode_video(vae, as_input(true))))
    error = (made.float() - true.float()).square().mean((1, 2, 3, 4)) / 255 ** 2
    assert (-10 * error.log10()).min() > 27


# ---- layout, chunks, parity
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 16)])
def test_frame_by_frame_in_double_precision(vae, shape):
    exact = copy.deepcopy(vae).double()
    b, f = shape
    video = as_input(clips(b, seed=1))[:, :, :f].double()
    spec = torch.stack([torch.stack([exact.encode(video[i, :, t][None]).latent_dist.mean[0] for t in range(f)], 1) for i in range(b)])
    torch.testing.assert_close(encode_video(exact, video), spec.detach() * vae.config.scaling_factor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 100])
def test_chunk_size_changes_nothing(vae, chunk):
    exact = copy.deepcopy(vae).double()
    video = as_input(clips(2, seed=2))[:, :, :7].double()
    latents = encode_video(exact, video, chunk)
    torch.testing.assert_close(latents, encode_video(exact, video, 14), atol=1e-9, rtol=1e-9)
    assert np.array_equal(decode_video(exact, latents, chunk), decode_video(exact, latents, 14))


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_are_no_larger_than_asked(vae, chunk, monkeypatch):
    sizes = []
    for name in ("encode", "decode"):
        inner = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda x, inner=inner: (sizes.append(len(x)), inner(x))[1])
    decode_video(vae, encode_video(vae, as_input(clips(1, seed=3)), chunk), chunk)
    assert max(sizes) == chunk and sum(sizes) == 32


@pytest.mark.parametrize("f", [1, 4, 5, 16])
def test_decode_is_that_of_the_diffusers_pipeline(vae, f):
    latents = encode_video(vae, as_input(clips(2, seed=4)))[:, :, :f]
    with torch.no_grad(): theirs = AnimateDiffPipeline.decode_latents(SimpleNamespace(vae=vae), latents, 16)
    ours = decode_video(vae, latents)
    assert ours.dtype == np.uint8 and ours.shape == (2, f, 32, 32, 3)
    assert np.abs(ours.astype(int) - rearrange(to_uint8(theirs), "b c f h w -> b f h w c").numpy().astype(int)).max() <= 1


def test_decode_without_unscaling_is_wrong():
    "With a factor like Stable Diffusion's, the division matters."
    vae = nano_autoencoder().eval()
    assert vae.config.scaling_factor == 0.18215
    latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): right = vae.decode(rearrange(latents, "1 c f h w -> f c h w") / 0.18215).sample
    assert np.array_equal(decode_video(vae, latents)[0], rearrange(to_uint8(right), "f c h w -> f h w c").numpy())


def test_to_uint8():
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255, 255]
    assert torch.equal(to_uint8(torch.arange(256) / 127.5 - 1), torch.arange(256).to(torch.uint8))


def test_half_precision_autoencoder(vae):
    half = copy.deepcopy(vae).bfloat16()
    latents = encode_video(half, as_input(clips(1, seed=5)))
    assert latents.dtype == torch.bfloat16
    assert decode_video(half, latents).dtype == np.uint8


# ---- text
def test_text_is_that_of_transformers(text_encoder, tokenizer):
    prompts = ["a red star moving left", "", "a blue moon"]
    ours = encode_text(tokenizer, text_encoder, prompts)
    assert ours.shape == (3, 16, 64)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([(tokenizer(prompt).input_ids + [1] * 16)[:16]])
        with torch.no_grad(): torch.testing.assert_close(ours[i], text_encoder(input_ids=ids).last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_what_stands_later_changes_nothing_before(text_encoder, tokenizer):
    a, b = encode_text(tokenizer, text_encoder, ["a red star moving left on a dark background", "a red star moving right on a light background"])
    difference = (a - b).norm(dim=1)
    assert difference[:5].max() < 1e-5 and difference[5:].min() > 1e-3


def test_opposite_directions_are_apart(text_encoder, tokenizer):
    "Of an encoder trained on stills, they are not: see the chapter."
    def pooled(text): return text_encoder(input_ids=tokenizer(text, padding="max_length", return_tensors="pt").input_ids).pooler_output[0]
    with torch.no_grad():
        colour = (pooled("a red star moving left") - pooled("a blue star moving left")).norm()
        for one, other in (("moving left", "moving right"), ("moving up", "moving down"), ("growing", "shrinking"), ("spinning clockwise", "spinning anticlockwise")):
            assert (pooled(f"a red star {one}") - pooled(f"a red star {other}")).norm() > 0.25 * colour


def test_unknown_words(tokenizer):
    with pytest.raises(ValueError) as caught: check_words(tokenizer, "a Crimson star, flying left and crimson")
    message = str(caught.value)
    assert message.startswith("The model does not know 'Crimson', 'flying', 'and', 'crimson'; the words that it knows are: a, anticlockwise, ")
    assert message.endswith("up, yellow.") and "\n" not in message and "<|" not in message
    for word in world_words(): assert f" {word}" in message


@pytest.mark.parametrize("prompt", ["", "a red star", "A RED STAR!", "a counterclockwise spinning star", " ".join(["star"] * 14)])
def test_known_words(tokenizer, prompt):
    assert check_words(tokenizer, prompt) is None


def test_too_long(tokenizer):
    with pytest.raises(ValueError, match="^The prompt has 15 words or word pieces and the text encoder reads 14: shorten it.$"):
        check_words(tokenizer, " ".join(["star"] * 15))


def byte_pair_tokenizer():
    "A tokenizer of CLIP's class: letters, and its unknown token is its end token."
    from transformers import CLIPTokenizer
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {t: i for i, t in enumerate(letters + [x + "</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=20)


def test_clip_knows_every_word():
    tokenizer = byte_pair_tokenizer()
    assert tokenizer.unk_token_id == tokenizer.eos_token_id
    check_words(tokenizer, "crimson flying")
    with pytest.raises(ValueError, match="has 23 words or word pieces and the text encoder reads 18"): check_words(tokenizer, "crimson flying crocodiles")


# ---- bad input: one sentence each
VIDEO, LATENTS = torch.zeros(1, 3, 2, 32, 32), torch.zeros(1, 4, 2, 8, 8)


@pytest.mark.parametrize("error, message, call", [
    (ValueError, r"takes \(batch, 3, frames, height, width\).* \(1, 3, 32, 32\)", lambda v: encode_video(v, VIDEO[:, :, 0])),
    (ValueError, r"takes \(batch, 3, .* \(1, 2, 3, 32, 32\)", lambda v: encode_video(v, VIDEO.transpose(1, 2))),
    (ValueError, r"\(0, 3, 2, 32, 32\)", lambda v: encode_video(v, VIDEO[:0])),
    (TypeError, "torch.uint8.*frames / 127.5 - 1", lambda v: encode_video(v, VIDEO.to(torch.uint8))),
    (ValueError, "go from -1 to 1; these go from 0 to 255", lambda v: encode_video(v, torch.cat([VIDEO, VIDEO + 255]))),
    (ValueError, "NaN or infinity", lambda v: encode_video(v, VIDEO / 0)),
    (ValueError, "32 x 30 pixels do not divide into blocks of 4 x 4", lambda v: encode_video(v, VIDEO[..., :30])),
    (ValueError, "chunk is 0", lambda v: encode_video(v, VIDEO, 0)),
    (ValueError, r"takes \(batch, 4, ", lambda v: decode_video(v, VIDEO)),
    (ValueError, "NaN or infinity", lambda v: decode_video(v, LATENTS / 0)),
    (ValueError, "chunk is -1", lambda v: decode_video(v, LATENTS, -1)),
])
def test_bad_videos(vae, error, message, call):
    with pytest.raises(error, match=message) as caught: call(vae)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("prompt", [None, 7, ["a red star"], b"a red star"])
def test_prompts_are_texts(tokenizer, prompt):
    with pytest.raises(TypeError, match=f"A prompt is a text; this is {type(prompt).__name__}"): check_words(tokenizer, prompt)


def test_one_text_for_a_list(tokenizer, text_encoder):
    "A single text where a list is due would be read letter by letter."
    with pytest.raises(TypeError, match="list of prompts"): encode_text(tokenizer, text_encoder, "a red star")
