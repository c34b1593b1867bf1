"""Chapter 1 from outside: files in and out, the world, the reader, folders of videos, and what bad input is told."""
from __future__ import annotations

import base64
import hashlib
import io
import os
import warnings

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from animatediff_lit import video as module
from animatediff_lit.video import (COLOURS, MOTIONS, SHAPES, WORLD, Scene, Video, VideoFolder, caption_variant, contact_sheet,
                                   draw_scenes, held_out, moving_sheet, read_clip)


def clip(motion: str = "bouncing", **kw) -> Video:
    scene = Scene.random(np.random.default_rng(4), motion=motion)
    return Video(scene.render(**kw), fps=8, caption=scene.caption)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text.endswith("."), text
    return text


# ---- showing
def test_shows_itself_as_a_moving_png():
    v = clip()
    bundle = v._repr_mimebundle_(include=None, exclude=None)
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert (picture.format, picture.n_frames, picture.size, picture.info["loop"]) == ("PNG", 16, (192, 192), 0)
    assert bundle["text/plain"] == repr(v) and v.caption in repr(v)


def test_ipython_uses_it():
    from IPython.core.interactiveshell import InteractiveShell
    data, _ = InteractiveShell.instance().display_formatter.format(clip())
    assert set(data) == {"image/png", "text/plain"}


def test_strip_is_one_png_picture():
    strip = clip().strip()
    assert strip.size == (8 * 96 + 7 * 4, 96) and not callable(getattr(strip, "_repr_jpeg_", None))
    assert clip().strip(every=4, scale=1).size == (4 * 32 + 3 * 4, 32)
    assert Video(np.zeros((2, 600, 300, 3), np.uint8)).strip().size[1] <= 192, "large frames are reduced"


# ---- saving and loading
@pytest.mark.parametrize("ending, largest, mean", [(".gif", 6, 2), (".apng", 0, 0), (".mp4", 40, 3)])
@pytest.mark.parametrize("motion", ["bouncing", "standing still"])
def test_what_is_saved_can_be_loaded(tmp_path, ending, largest, mean, motion):
    "Pillow merges equal frames, so a clip that stands still is the hard case. MP4 keeps colours for 2 x 2 pixels: twice the size."
    v = clip(motion)
    back = Video.load(v.save(tmp_path / f"v{ending}", scale=2))
    assert back.frames.shape == (16, 64, 64, 3) and back.fps == pytest.approx(v.fps)
    error = np.abs(back.frames[:, ::2, ::2].astype(int) - v.frames)
    assert error.max() <= largest and error.mean() <= mean
    assert np.abs(back.frames[:, ::2, ::2, ::-1].astype(int) - v.frames).mean() > 10, "red and blue swapped would be noticed"
    assert back.caption == ("" if ending == ".mp4" else v.caption)
    assert os.listdir(tmp_path) == [f"v{ending}"]


@pytest.mark.parametrize("fps", [8, 7, 12.5, 24, 30])
def test_gif_keeps_its_speed(tmp_path, fps):
    path = Video(clip().frames, fps).save(tmp_path / "v.gif")
    with Image.open(path) as picture:
        times = []
        for i in range(picture.n_frames):
            picture.seek(i)
            times.append(picture.info["duration"])
    assert picture.n_frames == 16 and sum(times) == pytest.approx(16_000 / fps, abs=10)
    assert Video.load(path).fps == fps


def test_gif_does_not_flicker_and_loops(tmp_path):
    noisy = clip().frames.copy()
    noisy[:, 8:] = np.random.default_rng(0).integers(256, size=noisy[:, 8:].shape)        # far more than 256 colours
    noisy[:, :8] = (90, 120, 30)
    path = Video(noisy).save(tmp_path / "v.gif", scale=1)
    still = Video.load(path).frames[:, :8]
    assert (still == still[0, 0, 0]).all() and Image.open(path).info["loop"] == 0


def test_mp4_plays_everywhere(tmp_path):
    "h264 in yuv420p has even sizes; an odd edge is doubled."
    v = Video(np.random.default_rng(0).random((5, 33, 47, 3)), fps=10)
    path = v.save(tmp_path / "v.mp4", scale=1)
    reader = imageio_ffmpeg.read_frames(path)
    header = next(reader)
    reader.close()
    assert header["codec"].startswith("h264") and header["pix_fmt"].startswith("yuv420p") and header["size"] == (48, 34)
    assert len(Video.load(path)) == 5


def test_small_frames_are_enlarged_with_sharp_pixels(tmp_path):
    large = Video.load(clip().save(tmp_path / "v.apng")).frames
    assert large.shape == (16, 192, 192, 3) and (large[:, ::6, ::6] == clip().frames).all() and (large[:, 5::6, 5::6] == clip().frames).all()
    assert Video.load(clip(size=256).save(tmp_path / "w.apng")).frames.shape[1] == 256, "large frames stay as they are"


def test_other_peoples_gif(tmp_path):
    pages = [Image.new("RGB", (20, 10), (50 * i, 0, 0)) for i in range(4)]
    pages[0].save(tmp_path / "v.gif", save_all=True, append_images=pages[1:], duration=200, comment=b"made elsewhere")
    v = Video.load(tmp_path / "v.gif")
    assert (len(v), v.fps, v.caption) == (4, 5, "")


def test_one_frame(tmp_path):
    v = Video(clip().frames[:1])
    for ending in (".gif", ".apng", ".mp4"): assert len(Video.load(v.save(tmp_path / f"v{ending}"))) == 1


def test_save_png_is_the_strip(tmp_path):
    assert Image.open(clip().save(tmp_path / "v.png")).size == clip().strip().size
    with pytest.raises(ValueError, match="still picture") as caught: Video.load(tmp_path / "v.png")
    one_sentence(caught.value)


def test_upper_case_and_strings(tmp_path):
    assert len(Video.load(str(clip().save(str(tmp_path / "V.GIF"))))) == 16


# ---- what bad input is told
@pytest.mark.parametrize("frames, kind, words", [
    (np.zeros((4, 8, 8), np.uint8), ValueError, "(4, 8, 8)"),
    (np.zeros((1, 4, 8, 8, 3), np.uint8), ValueError, "one clip at a time"),
    (torch.zeros(4, 3, 8, 8), ValueError, "rearrange"),
    (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "(0, 8, 8, 3)"),
    (np.zeros((2, 8, 8, 3), int), TypeError, "int64"),
    (np.zeros((2, 8, 8, 3), bool), TypeError, "bool"),
    (np.full((2, 8, 8, 3), 200.0), ValueError, "to 200"),
    (-torch.ones(2, 8, 8, 3), ValueError, "from -1"),
    (np.full((2, 8, 8, 3), np.nan), ValueError, "nan"),
    ("a.mp4", ValueError, "rearrange"),
])
def test_bad_frames(frames, kind, words):
    with pytest.raises(kind) as caught: Video(frames)
    assert words in one_sentence(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_float_tensors_are_taken(dtype):
    assert (Video(torch.ones(2, 8, 8, 3, dtype=dtype, requires_grad=True)).frames == 255).all()


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "8", None])
def test_bad_fps(fps):
    with pytest.raises(ValueError, match="more than 0") as caught: Video(clip().frames, fps)
    one_sentence(caught.value)


@pytest.mark.parametrize("scale", [0, -2, 1.5])
def test_bad_scale(tmp_path, scale):
    with pytest.raises(ValueError, match="whole number"): clip().save(tmp_path / "v.gif", scale=scale)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name, kind", [("v.mov", ValueError), ("v", ValueError), ("none/v.gif", FileNotFoundError), ("file/v.gif", NotADirectoryError), ("folder.gif", OSError)])
def test_bad_paths(tmp_path, name, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(kind) as caught: clip().save(tmp_path / name)
    assert name.split("/")[-1] in one_sentence(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.gif"]


def test_nothing_half_written(tmp_path, monkeypatch):
    path = clip().save(tmp_path / "v.gif")
    before = path.read_bytes()
    def refuse(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(PermissionError, match="cannot be written .Permission denied.") as caught: clip("growing").save(path)
    one_sentence(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["v.gif"]


@pytest.mark.parametrize("ending", [".gif", ".apng", ".png", ".mp4"])
@pytest.mark.parametrize("content", [b"", b"no video", "half"])
def test_broken_files(tmp_path, ending, content):
    path = tmp_path / f"v{ending}"
    if content == "half":
        whole = clip().save(tmp_path / f"whole{'.apng' if ending == '.png' else ending}").read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a video") as caught: Video.load(path)
    one_sentence(caught.value)


@pytest.mark.parametrize("name, kind", [("none.gif", FileNotFoundError), ("text.txt", ValueError)])
def test_no_video_to_load(tmp_path, name, kind):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(kind) as caught: Video.load(tmp_path / name)
    assert name in one_sentence(caught.value)


# ---- many videos in one picture
def test_contact_sheet():
    videos = [clip(m) for m in MOTIONS[:5]]
    sheet = contact_sheet(videos, columns=2)
    assert sheet.mode == "RGB" and sheet.size[0] <= 1000
    rows = np.asarray(sheet.convert("L")).min(1)
    assert (rows == 255).any() and (np.asarray(sheet)[: sheet.height // 8] == 0).all(-1).any(), "the captions are black on white"
    assert not np.array_equal(np.asarray(sheet), np.asarray(contact_sheet([Video(v.frames) for v in videos]))), "captions are drawn"
    for make in (contact_sheet, moving_sheet):
        with pytest.raises(ValueError, match="at least one video") as caught: make([])
        one_sentence(caught.value)


def test_contact_sheet_of_a_long_caption_and_of_large_frames():
    long = Video(clip().frames, caption="a very long prompt, " * 12)
    assert contact_sheet([long]).width == contact_sheet([clip()]).width and contact_sheet([long]).height > contact_sheet([clip()]).height
    assert contact_sheet([Video(np.zeros((16, 512, 512, 3), np.uint8))]).width <= 1000


def test_moving_sheet():
    moving = moving_sheet([clip(), Video(clip().frames[:7]), clip()], columns=2)
    assert len(moving) == 7 and not (moving[0] == moving[3]).all()


# ---- the world
def test_scenes_follow_from_the_seed():
    "The numbers that the shipped model was trained on: numpy's generator gives them on every machine."
    scenes = draw_scenes(2000, seed=2)
    text = "".join(f"{s.caption} {s.x:.9f} {s.y:.9f} {s.radius:.9f} {s.angle:.9f} {s.travel:.9f}" for s in scenes)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3af1ff91dc6fbe3a"


def test_pixels_follow_from_the_scene():
    "Of each motion a quick fingerprint; a last digit may differ between processors, so not bit by bit."
    rng = np.random.default_rng(0)
    scenes = [Scene.random(rng, motion=m, shape=SHAPES[i % 6]) for i, m in enumerate(MOTIONS)]
    weight = np.random.default_rng(1).random((16, 32, 32, 3))
    found = [float((s.render() * weight).mean()) for s in scenes]
    assert found == pytest.approx([108.8733, 109.7127, 110.4443, 17.7411, 113.5353, 110.467, 19.868, 108.9011, 18.313, 17.7314, 20.1872], abs=1e-3)
    assert all((s.render() == s.render()).all() for s in scenes)


def test_a_fifth_is_held_out():
    triples = [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]
    assert sum(held_out(*t) for t in triples) / len(triples) == pytest.approx(0.2, abs=0.005)
    assert not any(held_out(s.colour, s.shape, s.motion) for s in draw_scenes(500, seed=9))


def test_captions():
    s = Scene("red", "star", "moving left", "dark")
    assert s.caption == caption_variant(s, 0) == "a red star moving left on a dark background"
    assert [caption_variant(s, k) for k in (1, 2, 3)] == ["a red star moving left", "a red star on a dark background", "a red star"]


def test_objects_keep_inside_the_picture():
    rng = np.random.default_rng(6)
    for _ in range(200):
        scene = Scene.random(rng)
        x, y, _, _ = scene.path(np.arange(16))
        assert max(np.abs(x).max(), np.abs(y).max()) < 0.8, scene


@pytest.mark.parametrize("make, kind, words", [
    (lambda: Scene("teal", "star", "growing", "dark"), ValueError, "red, orange"),
    (lambda: Scene.random(0, motion="walking"), ValueError, "moving left"),
    (lambda: Scene.random(0, color="red"), TypeError, "'color'"),
    (lambda: Scene("red", "star", "growing", "dark").render(frames=0), ValueError, "at least 1 frame"),
    (lambda: module.outline("cube"), ValueError, "circle, square"),
    (lambda: Scene("red", "star", "growing", "dark").render(style="oil"), ValueError, "plain, neon"),
])
def test_words_of_another_world(make, kind, words):
    with pytest.raises(kind) as caught: make()
    assert words in one_sentence(caught.value)


# ---- the reader
def spoil(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x = np.pad(frames.astype(float), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
    return (x + rng.normal(0, 15, x.shape)).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoiled", [False, True], ids=["as drawn", "spoiled"])
def test_reader_is_right(spoiled):
    rng = np.random.default_rng(31)
    scenes = [Scene.random(rng, motion=MOTIONS[i % 11]) for i in range(154)]
    readings = [read_clip(spoil(s.render(), rng) if spoiled else s.render()) for s in scenes]
    right = {k: np.mean([getattr(r, k) == getattr(s, k) for r, s in zip(readings, scenes)]) for k in WORLD}
    assert min(right["motion"], right["colour"], right["background"]) >= 0.98, right
    assert right["shape"] >= (0.92 if spoiled else 0.98), right
    for m in MOTIONS:
        mine = [r.motion for r, s in zip(readings, scenes) if s.motion == m]
        assert mine.count(m) / len(mine) >= 0.9, (m, mine)


def test_another_style_changes_the_look_and_nothing_else():
    rng = np.random.default_rng(32)
    scenes = [Scene.random(rng, motion=m, shape=s) for m in MOTIONS for s in SHAPES]
    for s in scenes:
        plain, neon = s.render(), s.render(style="neon")
        assert (read_clip(neon).motion, read_clip(neon).colour, read_clip(neon).background) == (s.motion, s.colour, s.background), s
        assert module.hollow(neon) > module.hollow(plain) + 0.2, s
    assert np.mean([read_clip(s.render(style="neon")).shape == s.shape for s in scenes]) > 0.95


def test_holes_are_filled_and_bays_are_not():
    ring, bay = torch.zeros(2, 1, 12, 12)
    ring[:, 2:9, 2:9], bay[:, 2:9, 2:9] = 0.8, 0.8
    ring[:, 4:7, 4:7], bay[:, 4:7, 4:] = 0, 0
    assert (module.filled(ring)[:, 2:9, 2:9] == 0.8).all() and module.filled(ring).sum() == pytest.approx(49 * 0.8)
    assert module.filled(bay).equal(bay)
    ring[:, 5, 2:4] = 0.3                                                                   # a thin place in the wall
    assert module.filled(ring)[0, 5, 5] == pytest.approx(0.3)


def test_reader_at_another_size_and_type():
    rng = np.random.default_rng(8)
    for motion in MOTIONS:
        s = Scene.random(rng, motion=motion)
        large = torch.from_numpy(s.render(size=64)).float() / 255
        assert vars(read_clip(large)) == {k: getattr(s, k) for k in WORLD}


def test_reader_says_unclear():
    rng = np.random.default_rng(2)
    star = Scene("red", "star", "moving right", "dark").render()
    jumping = np.stack([Scene("red", "star", "standing still", "dark", x=x, y=y).render(1)[0] for x, y in rng.uniform(-0.5, 0.5, (16, 2))])
    for frames in (star[:1], np.concatenate([star[::2], star[::-2]]), rng.permutation(star), jumping):
        assert read_clip(frames).motion == "unclear" and read_clip(frames).colour == "red"
    for frames in (np.zeros_like(star), np.full_like(star, 255), rng.integers(256, size=star.shape, dtype=np.uint8)):
        r = read_clip(frames)
        assert (r.colour, r.shape, r.motion) == ("unclear",) * 3
    assert read_clip(np.full_like(star, 128)).background == "unclear"


# ---- folders of videos
@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Three good films of different sizes that count their frames in grey, and every kind of bad one."
    folder = tmp_path_factory.mktemp("films")
    rows = ["videoid,name,page_dir"]
    for name, frames, height, width in (("a", 60, 40, 60), ("b", 40, 60, 40), ("c", 31, 32, 32), ("short", 30, 32, 32), ("cut", 60, 32, 32), ("damaged", 60, 32, 32)):
        grey = (20 + 3 * np.arange(frames))[:, None, None, None]
        noise = np.random.default_rng(0).integers(0, 60, size=(frames, height, width, 3)) if name == "damaged" else 0
        Video((np.broadcast_to(grey, (frames, height, width, 3)) + noise).astype(np.uint8), fps=24).save(folder / f"{name}.mp4", scale=1)
        rows.append(f'{name},"film {name}, with a comma",somewhere')
    cut, damaged = folder / "cut.mp4", folder / "damaged.mp4"
    cut.write_bytes(cut.read_bytes()[:-500])
    data = bytearray(damaged.read_bytes())
    data[len(data) // 4: len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    damaged.write_bytes(data)
    (folder / "all.csv").write_text("\n".join(rows + ["gone,nobody has seen it,"]), encoding="utf-8")
    return folder


def numbers(frames: torch.Tensor) -> list[int]:
    return ((frames.float().mean((1, 2, 3)) - 20) / 3).round().int().tolist()


def test_video_folder(films):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data = VideoFolder(films, films / "all.csv", size=24, stride=2)
        assert sorted(data.problems) == ["cut", "gone", "short"] and len(data) == 4
        items = list(data)                                                                  # meets the damage on its way
    assert "30 frames and 31 are needed" in data.problems["short"] and "no such file" in data.problems["gone"]
    assert sorted(data.problems) == ["cut", "damaged", "gone", "short"]
    told = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(told) == 4 and all(any(f"{name}.mp4" in t for t in told) for name in data.problems), told
    assert [caption for _, caption in items] == [f"film {name}, with a comma" for name in "abca"], "the next good one stands in"
    for frames, _ in items:
        assert frames.dtype == torch.uint8 and frames.shape == (16, 24, 24, 3)
        assert np.diff(numbers(frames)).tolist() == [2] * 15


def test_video_folder_follows_from_its_seed(films):
    (films / "one.csv").write_text("videoid,name,page_dir\na,counting,")
    starts = [numbers(VideoFolder(films, films / "one.csv", frames=8, size=16, stride=1, seed=seed)[0][0])[0] for seed in (0, 0, 1, 2, 3)]
    assert starts[0] == starts[1] and len(set(starts)) > 2


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_video_folder_bad_input(films, tmp_path):
    (tmp_path / "bad.csv").write_text("id,caption\na,b")
    with pytest.raises(ValueError, match="no column name and no column videoid") as caught: VideoFolder(films, tmp_path / "bad.csv")
    one_sentence(caught.value)
    with pytest.raises(ValueError, match="None of the 7 videos") as caught: VideoFolder(tmp_path, films / "all.csv")
    one_sentence(caught.value)
    with pytest.raises(ValueError, match="at least 1") as caught: VideoFolder(films, films / "all.csv", stride=0)
    one_sentence(caught.value)
    with pytest.raises(FileNotFoundError): VideoFolder(films, tmp_path / "none.csv")
    with pytest.raises(IndexError): VideoFolder(films, films / "all.csv", stride=2)[4]
