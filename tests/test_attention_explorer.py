"""The attention explorer: its logic without a browser, its page in a browser without a network, and the widget in JupyterLab."""
from __future__ import annotations

import base64
import io
import json
import os
import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import animatediff_lit.attention_maps as attention_maps
from animatediff_lit.attention_maps import AttentionExplorer, answer_follow, answer_layer, attention_weights, explore_attention, in_bytes
from animatediff_lit.attention_maps import known_cards, layer_label, record_attention, reply_to, run_key, spread
from animatediff_lit.pipeline import AnimationPipeline
from explorers import browser, lab, lab_page, offline_page, run_cell, sentence  # noqa: F401  (two of them are fixtures)

PROMPT, OPTIONS = "a red star moving left", dict(num_inference_steps=4, guidance_scale=2.0, seed=0, progress=False)
LAYERS = 14
READY = ".attention-explorer[data-ready=true]"


@pytest.fixture(scope="module")
def pipe() -> AnimationPipeline:
    return AnimationPipeline.from_pretrained("nano")


@pytest.fixture(scope="module")
def made(pipe) -> AttentionExplorer:
    "The one explorer that runs the model; the tests work on copies of it."
    return explore_attention(pipe, PROMPT, **OPTIONS)


@pytest.fixture
def explorer(made) -> AttentionExplorer:
    return AttentionExplorer(made.recording, made.video)


# ---- logic, without a browser
def test_opens_at_the_head_that_looks_the_least_far(explorer):
    recording, step = explorer.recording, explorer.recording.steps[2]
    reach = {name: recording.score(name, step, "reach") for name in recording.layers}
    assert explorer.step == step and explorer.frame == explorer.key_frame == 8
    assert reach[explorer.layer][explorer.head] == min(r.min() for r in reach.values())
    assert explorer.pixel is explorer.other is None and not explorer.locked


@pytest.mark.parametrize("name, value, says", [
    ("step", 4, "0, 1, 2, 3"), ("layer", "attn9", "up_blocks.1"), ("head", 4, "0, 1, 2, 3"), ("frame", 16, "15"), ("key_frame", -1, "0, 1"),
    ("pixel", (8, 0), "(7, 7)"), ("other", (0, -1), "(7, 7)"), ("pixel", (1, 2, 3), "None"), ("measure", "depth", "entropy, reach, diagonal"),
    ("order", "up", "network"), ("panel", "all", "known")])
def test_bad_choices_get_a_sentence(explorer, name, value, says):
    before = getattr(explorer, name)
    text = sentence(lambda: explorer.set_trait(name, value))
    assert name in text and says in text and getattr(explorer, name) == before


def test_matrix_follows_the_choices(explorer):
    layer, step = explorer.recording.layers[3], 1
    explorer.layer, explorer.head, explorer.step = layer, 2, step
    assert torch.equal(explorer.matrix(), explorer.recording.mean_map(layer, step)[2])
    assert torch.equal(explorer.matrix((5, 6)), explorer.recording.maps(layer, step, (5, 6))[2])
    assert not torch.equal(explorer.matrix((5, 6)), explorer.matrix((0, 0)))


def test_summary_says_what_is_recorded(explorer):
    explorer.pixel, explorer.frame = [4, 4], 3
    row = explorer.recording.maps(explorer.layer, explorer.step, (4, 4))[explorer.head, 3]
    best = row.argmax().item()
    assert f"frame 3 looks most at frame {best} ({row[best]:.2f})" in explorer.summary
    assert f"reach {explorer.recording.scalar(explorer.layer, explorer.step, 'reach')[explorer.head, 4, 4]:.2f} frames" in explorer.summary
    explorer.other = [4, 4]
    assert explorer.summary.endswith("; 0 % of the weight lies elsewhere than at A.")
    explorer.other = [0, 0]
    apart = (explorer.matrix((4, 4)) - explorer.matrix((0, 0))).abs().sum(1).mean().item() / 2
    assert abs(float(re.search(r"; (\d+) % of the weight", explorer.summary)[1]) - 100 * apart) < 1.5


def test_a_layer_with_fewer_heads_keeps_the_choice_possible(explorer, monkeypatch):
    explorer.head = 3
    few = explorer.recording.layers[0]
    heads = type(explorer.recording).heads
    monkeypatch.setattr(type(explorer.recording), "heads", lambda self, layer: 2 if layer == few else heads(self, layer))
    explorer.layer = few
    assert explorer.head == 1


@pytest.mark.parametrize("layer", (0, 4, LAYERS - 1))
def test_layer_answer_holds_the_maps(explorer, layer):
    recording, name = explorer.recording, explorer.recording.layers[layer]
    info, data = answer_layer(recording, layer, 1)
    (h, w), f = recording.grid(name), recording.frames
    scalars = np.frombuffer(data, "<f4", 3 * 4 * h * w).reshape(3, 4, h, w)
    for values, measure in zip(scalars, ("entropy", "reach", "diagonal")): assert np.array_equal(values, recording.scalar(name, 1, measure).numpy())
    maps = np.frombuffer(data, np.uint8, offset=scalars.nbytes).reshape(h * w, 4, f, f)
    assert info["pixels"] == [[y, x] for y in range(h) for x in range(w)]
    for y, x in ((0, 0), (h - 1, 1)):
        exact = recording.maps(name, 1, (y * 8 // h, x * 8 // w)).numpy()
        assert np.abs(maps[y * w + x] / 255 - exact).max() <= 0.5 / 255 + 1e-6


def test_follow_answer_gives_the_recorded_weights(explorer):
    recording = explorer.recording
    for layer, (y, x), pixel in ((0, (3, 5), (3, 5)), (4, (3, 1), (6, 2))):
        info, data = answer_follow(recording, layer, 2, y, x, 1)
        q, k = torch.from_numpy(np.frombuffer(data, "<f4").reshape(2, recording.frames, info["width"]).copy())
        torch.testing.assert_close(attention_weights(q, k), recording.maps(recording.layers[layer], 2, pixel)[1], atol=1e-5, rtol=0)


def test_some_pixels_only(pipe, tmp_path):
    with record_attention(pipe, pixels=[(3, 4)], steps=[0, 2]) as recording: video = pipe(PROMPT, **OPTIONS)
    one = AttentionExplorer(recording, video, pixel=(3, 4))
    info, _ = one.answer(f"layer/0/{recording.steps[1]}")
    assert info["pixels"] == [[3, 4]] and "pixel (3, 4)" in one.summary
    one.pixel = None
    assert one.to_html(tmp_path / "page.html", steps=9).stat().st_size < 2e6
    assert "pixels=[(0, 0)]" in sentence(lambda: one.answer("follow/0/0/0/0/0"))


def test_recording_and_clip_must_belong_together(made, pipe):
    short = type(made.video)(made.video.frames[:9])
    assert "9 frames" in sentence(lambda: AttentionExplorer(made.recording, short))
    with record_attention(pipe) as empty: pass
    assert "temporal" in sentence(lambda: AttentionExplorer(empty, made.video))


def test_labels():
    assert layer_label("up_blocks.1.motion_modules.0.transformer_blocks.0.attn2") == "Up 1.0 attn2"
    assert layer_label("down_blocks.2.motion_modules.1.transformer_blocks.3.attn1") == "Down 2.1.3 attn1"
    assert layer_label("mid_block.motion_modules.0.transformer_blocks.0.attn1") == "Mid 0 attn1"
    assert layer_label("attention") == "attention"


def test_spread():
    assert spread(range(25), 6) == [0, 5, 10, 14, 19, 24] and spread([3, 7], 6) == [3, 7] and spread([3, 7], 1) == [3]
    sentence(lambda: spread([1], 0))


# ---- the switches
def test_runs(made, pipe):
    calls = []
    explorer = AttentionExplorer(made.recording, made.video, rerun=lambda **switches: calls.append(switches) or made.rerun(**switches))
    assert np.array_equal(explorer.run(temperature=1).frames, made.video.frames)
    zeroed = {"zero_heads": [[explorer.layer, explorer.head]]}
    video = explorer.run(**zeroed)
    assert not np.array_equal(video.frames, made.video.frames) and explorer.switches == zeroed
    info, data = explorer.answer(run_key(zeroed))
    assert len(calls) == 2, "a run that is there already was made again"
    assert data[:video.frames.size] == video.frames.tobytes() and len(data) == video.frames.size + explorer.base.means.size
    assert explorer.runs == [run_key({"temperature": 1}), run_key(zeroed)]
    assert not any("attend" in vars(m) for m in pipe.unet.modules())


def test_runs_need_a_model(explorer):
    assert "explore_attention" in sentence(lambda: explorer.run(window=1))


def test_run_key_is_that_of_the_script():
    assert run_key({"window": 2, "temperature": 2.0, "zero_heads": [("a.b", 3)]}) == 'run/{"temperature":2,"window":2,"zero_heads":[["a.b",3]]}'
    assert run_key({"temperature": 0.25, "drop_position": True}) == 'run/{"drop_position":true,"temperature":0.25}'


def test_messages_are_answered(explorer, monkeypatch):
    sent = []
    monkeypatch.setattr(explorer, "send", lambda content, buffers=None: sent.append((content, buffers)))
    for key in ("layer/0/1", "layer/99/1", "run/{}", "nonsense"): reply_to(explorer, key)
    (good, data), *bad = sent
    assert good["key"] == "layer/0/1" and data[0] == explorer.answer("layer/0/1")[1]
    assert [content["key"] for content, _ in bad] == ["layer/99/1", "run/{}", "nonsense"] and all("error" in content for content, _ in bad)


def test_known_answers_pass_and_can_fail(monkeypatch):
    assert [card["passed"] for card in known_cards()] == [True] * 3
    monkeypatch.setattr(attention_maps, "attention_weights", lambda q, k: (2 * q @ k.mT).softmax(-1))
    assert {card["name"]: card["passed"] for card in known_cards()}["dot"] is False


# ---- what a cell leaves
def test_no_widget_in_saved_notebooks(explorer, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    data = explorer._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"} and data["text/plain"] == explorer.summary
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert picture.width <= 1000 and len(picture.getcolors(256)) > 8


def test_a_kernel_shows_both(explorer, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    data, _ = explorer._repr_mimebundle_()
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(data)


# ---- the page
def parts(text: str) -> tuple[dict, dict, bytes]:
    "The state, the index and the bytes that a page stores."
    found = {name: re.search(rf'id="attention-{name}">(.*?)</script>', text, re.S)[1] for name in ("state", "store")}
    state = json.loads(found["state"])
    return state["state"], state["index"], zlib.decompress(base64.b64decode(found["store"]))


def test_page_stores_what_it_shows(explorer, tmp_path):
    explorer.pixel = [4, 4]
    state, index, store = parts(explorer.to_html(tmp_path / "page.html", steps=2).read_text(encoding="utf-8"))
    assert [s["step"] for s in state["info"]["steps"]] == [0, 3] and state["step"] == 3 and state["live"] is False
    for key in ("layer/3/0", f"follow/{LAYERS - 1}/3/4/4/3"):
        part = index[key]
        assert store[part["start"]:part["start"] + part["size"]] == explorer.answer(key)[1]
    assert sum(part["size"] for part in index.values()) == len(store)
    assert np.array_equal(in_bytes(explorer.recording.mean_map(explorer.recording.layers[0], 0)).ravel(), np.frombuffer(store, np.uint8, 1024, index["means"]["start"]))


def test_page_takes_any_caption(made, tmp_path):
    video = type(made.video)(made.video.frames, caption='</script><b onclick="x">&')
    text = AttentionExplorer(made.recording, video).to_html(tmp_path / "page.html", steps=1).read_text(encoding="utf-8")
    assert "</script><b" not in text and "<b onclick" not in text and parts(text)[0]["info"]["caption"] == video.caption


def test_page_names_no_address(explorer, tmp_path):
    text = explorer.to_html(tmp_path / "page.html", steps=1).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"} and "import " not in text


# ---- in a browser
@pytest.fixture(scope="module")
def html(made, tmp_path_factory) -> Path:
    explorer = AttentionExplorer(made.recording, made.video, rerun=made.rerun, pixel=(4, 4))
    explorer.run(drop_position=True)
    explorer.pixel = None
    return explorer.to_html(tmp_path_factory.mktemp("page") / "explorer.html", steps=4)


@pytest.fixture
def page(browser, html):  # noqa: F811
    with offline_page(browser, html, READY, timeout=10_000) as page: yield page


def pixels(page, selector: str) -> str:
    "What is painted on a canvas."
    return page.locator(selector).first.evaluate("c => c.toDataURL()")


def settle(page) -> None:
    "Wait until a change is drawn."
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    page.wait_for_selector(READY)


def changes(page, selector: str, act) -> None:
    before = pixels(page, selector)
    act(); settle(page)
    assert pixels(page, selector) != before, f"{selector} shows the same as before"


def words(page) -> str: return page.locator(".summary").inner_text()


PLOT, PICTURE = ".plot canvas", ".stage canvas"

STEP = """(async by => {
  const root = document.querySelector('.attention-explorer'), slider = root.querySelector('input[type=range]'), times = [];
  for (const value of by) {
    const before = root.dataset.drawn, start = performance.now();
    slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true }));
    await new Promise(done => { const look = () => root.dataset.drawn !== before && root.dataset.ready === 'true' ? done() : requestAnimationFrame(look); look(); });
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b);
})"""


def patience() -> float:
    "1 on a machine that is free; where more processes want to run than there are cores, each waits for the others that much longer."
    return max(1.0, os.getloadavg()[0] / os.cpu_count()) if hasattr(os, "getloadavg") else 1.0


def test_page_is_quick(browser, html, capsys):  # noqa: F811
    context = browser.new_context(offline=True)
    opened = []
    for _ in range(3):                                          # the best of three: other work on the machine only adds
        page, start = context.new_page(), time.perf_counter()
        page.goto(html.as_uri()); page.wait_for_selector(READY)
        opened.append(time.perf_counter() - start)
    page.locator(".stage").click()                              # with a pixel, a step needs that step's own data
    steps = page.evaluate(STEP + "([0, 1, 2, 3, 0, 3, 1])")
    context.close()
    with capsys.disabled(): print(f"\n  explorer page: {html.stat().st_size / 1e6:.1f} MB, opens in {min(opened):.2f} s, a step in {steps[len(steps) // 2]:.0f} ms (at most {steps[-1]:.0f}); load {patience():.1f}")
    assert min(opened) < 2 * patience() and steps[len(steps) // 2] < 150 * patience()
    assert html.stat().st_size < 6e6


def test_page_says_what_python_says(page, made):
    explorer = AttentionExplorer(made.recording, made.video)
    assert words(page) == explorer.summary
    page.locator(".stage").click(position={"x": 5, "y": 5}); settle(page)
    page.locator(".stage").click(position={"x": 130, "y": 130}); settle(page)
    explorer.pixel, explorer.other = [0, 0], [4, 4]
    assert words(page) == explorer.summary


def test_film_strip(page):
    frames = page.locator(".strip:not(.plain) .frame")
    assert frames.count() == 16
    frames.nth(2).hover(); settle(page)
    assert "frame 2 looks most" in words(page) and frames.nth(2).get_attribute("aria-checked") == "true"
    shown = [float(frames.nth(j).locator("b").inner_text()) for j in range(16)]
    faded = [float(frames.nth(j).locator("canvas").evaluate("c => c.style.opacity")) for j in range(16)]
    assert abs(sum(shown) - 1) < 0.09 and shown.index(max(shown)) == faded.index(max(faded)) and max(faded) == 1
    page.mouse.move(5, 5); settle(page)
    assert "frame 8 looks most" in words(page), "without a click, the strip lets go"
    changes(page, PICTURE, frames.nth(2).click)
    frames.nth(12).hover(); settle(page)
    assert "frame 2 looks most" in words(page), "a click holds the frame"
    frames.nth(2).focus(); page.keyboard.press("ArrowRight"); settle(page)
    assert "frame 3 looks most" in words(page) and page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Frame 3,")
    assert "frame 3 looks most" in page.locator("[aria-live]").inner_text()


def test_layer_head_and_step(page):
    changes(page, PLOT, lambda: page.get_by_label("Layer", exact=True).select_option(index=0))
    assert words(page).startswith("Down 0.0 attn1")
    changes(page, PLOT, page.get_by_role("radio", name="Head 0").click)
    changes(page, PLOT, lambda: page.keyboard.press("ArrowRight"))
    assert "head 1" in words(page)
    changes(page, PLOT, page.get_by_label("Next step").click)
    assert "step 4 of 4" in words(page)
    changes(page, PLOT, page.get_by_label("Previous step").click)
    page.get_by_role("slider").focus(); page.keyboard.press("Home"); settle(page)
    assert "step 1 of 4" in words(page)
    page.get_by_label("Play the steps").click()
    page.wait_for_function("document.querySelector('.summary').textContent.includes('step 3 of 4')")
    page.get_by_label("Pause").click(); settle(page)
    stopped = words(page)
    page.wait_for_timeout(500)
    assert words(page) == stopped and page.get_by_label("Play the steps").get_attribute("aria-pressed") == "false"


def test_pixels(page):
    stage = page.locator(".stage")
    changes(page, PLOT, lambda: stage.click(position={"x": 130, "y": 130}))
    assert "pixel (4, 4)" in words(page) and page.locator(".matrix").nth(1).is_hidden()
    stage.click(position={"x": 5, "y": 5}); settle(page)
    assert "Pixel B (0, 0)" in words(page) and page.locator(".matrix").nth(1).is_visible() and page.locator(".thumb canvas:visible").count() == 8
    page.get_by_role("button", name="Clear pixels").click(); settle(page)
    assert "mean over all pixels" in words(page)
    stage.focus()
    for key in ("ArrowDown", "ArrowRight", "Enter", "ArrowUp", "Shift+Enter"): page.keyboard.press(key)
    settle(page)
    assert "pixel (1, 1)" in words(page) and "Pixel B (0, 1)" in words(page), "the keys go on from where the last click was"
    page.keyboard.press("Escape"); settle(page)
    assert "mean over all pixels" in words(page)


def test_measure_overlay_and_order(page):
    tile = page.locator(".tile")
    first = lambda: tile.first.get_attribute("aria-label")
    assert tile.count() == 4 * LAYERS and "entropy" in first()
    overlay = page.get_by_role("button", name="Lay over the frame")
    assert page.locator(".heat").is_hidden()
    overlay.click(); settle(page)
    assert page.locator(".heat").is_visible() and "Entropy" in page.locator(".left .scale").inner_text()
    changes(page, ".heat", page.get_by_role("radio", name="Reach").click)
    assert "reach" in first() and "Reach" in page.locator(".chart .title").inner_text()
    for order, sign in (("Low first", 1), ("High first", -1)):
        page.get_by_role("radio", name=order).click(); settle(page)
        values = [sign * float(v) for v in page.locator(".tile b").all_inner_texts()]
        assert values == sorted(values) and values[0] < values[-1]
    changes(page, PLOT, tile.first.click)
    assert tile.first.get_attribute("aria-pressed") == "true"
    page.get_by_role("radio", name="Network").click(); settle(page)
    assert first().startswith("Down 0.0 attn1, head 0")


def test_follow_one_number(page):
    page.locator(".stage").click(position={"x": 130, "y": 130})
    box = page.locator(".plot").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 9.5 / 16, box["y"] + box["height"] * 7.5 / 16)
    page.get_by_role("tab", name="Follow one number").click(); settle(page)
    chain = page.locator(".chain")
    assert "q of frame 7" in chain.inner_text() and "k of frame 9" in chain.inner_text() and "✓ Agrees" in chain.inner_text()
    dot, root, score = map(lambda t: float(t.replace("−", "-")), re.search(r"([−\d.]+) ÷ ([\d.]+) = ([−\d.]+)\.", chain.inner_text()).groups())
    assert abs(dot / root - score) < 2e-3
    page.get_by_label("Key frame: one more").click(); settle(page)
    assert "k of frame 10" in chain.inner_text() and "✓ Agrees" in chain.inner_text()
    page.locator(".plot").first.focus(); page.keyboard.press("ArrowUp"); settle(page)
    assert "q of frame 6" in chain.inner_text()
    page.locator(".stage").click(position={"x": 5, "y": 5}); page.locator(".stage").click(position={"x": 5, "y": 5}); settle(page)
    assert "needs a kernel" in chain.inner_text()
    page.get_by_role("button", name="Go to pixel (4, 4)").click(); settle(page)
    assert "✓ Agrees" in chain.inner_text()


def test_stored_runs(page):
    page.get_by_role("tab", name="What if").click(); settle(page)
    panel = page.get_by_role("tabpanel", name="What if")
    assert "need a kernel" in panel.inner_text() and page.get_by_role("button", name="Run again").is_disabled()
    panel.get_by_role("button", name="no position encoding").click(); settle(page)
    assert panel.locator(".strip canvas").count() == 48 and re.search(r"\d\.\d+ %", panel.inner_text())
    assert panel.get_by_role("button", name="Drop the position encoding").get_attribute("aria-pressed") == "true"


def test_known_answers_and_help(page):
    page.get_by_role("tab", name="Layers and heads").focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    settle(page)
    assert [card.inner_text() for card in page.locator(".card .title b").all()] == ["✓ pass"] * 3
    page.keyboard.press("ArrowRight"); settle(page)
    assert "does not prove" in page.get_by_role("tabpanel").inner_text()


def test_every_control_has_a_name_and_is_reached_by_tab(page):
    nameless = "[...document.querySelectorAll('button, select, input, [tabindex=\"0\"]')].filter(e => e.offsetParent && !(e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
    for tab in page.get_by_role("tab").all()[::-1]:
        tab.click(); settle(page)
        assert page.evaluate(nameless) == []
    seen = set()
    page.get_by_label("Layer", exact=True).focus()
    for _ in range(24):
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen
        page.keyboard.press("Tab")
    for name in ("Play the steps", "Denoising step", "Entropy", "Lay over the frame", "Layers and heads"): assert name in seen, f"Tab never came to {name}: {seen}"
    assert any(s.startswith("Frame 8,") and "Arrow" in s for s in seen) and any(s.startswith("Matrix") for s in seen)


def shade(page) -> list[list[int]]:
    "Red, green and blue of the ground and of the writing."
    css = page.evaluate("(() => { const s = getComputedStyle(document.querySelector('.attention-explorer')); return [s.backgroundColor, s.color] })()")
    return [[int(n) for n in re.findall(r"\d+", c)[:3]] for c in css]


def test_dark_theme_is_dark(browser, html):  # noqa: F811
    shades = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, offline=True)
        page = context.new_page()
        page.goto(html.as_uri()); page.wait_for_selector(READY)
        shades[scheme] = [sum(rgb) / 3 for rgb in shade(page)]
        context.close()
    assert shades["light"][0] > 200 > 80 > shades["light"][1] and shades["dark"][0] < 60 < 200 < shades["dark"][1]


# ---- live in JupyterLab
CELLS = ["from animatediff_lit.attention_maps import explore_attention\nfrom animatediff_lit.pipeline import AnimationPipeline",
         f"explorer = explore_attention(AnimationPipeline.from_pretrained('nano'), {PROMPT!r}, **{dict(OPTIONS, num_inference_steps=3)!r})\nexplorer",
         "print(explorer.pixel, explorer.locked, explorer.summary)"]


def test_widget_in_jupyterlab(lab, browser, capsys):  # noqa: F811
    with lab_page(browser, lab, CELLS, height=1200, timeout=30_000) as page:
        run = "() => { window.ran = null; jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.ran = true) }"
        page.evaluate(run)
        page.wait_for_selector(READY, timeout=120_000)
        page.wait_for_function("window.ran", timeout=60_000)
        assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        assert page.locator(".jp-OutputArea-output img:visible").count() == 0, "the still picture stands beside the widget"

        page.locator(".stage").click(position={"x": 130, "y": 130}); settle(page)
        assert "pixel (4, 4)" in words(page)
        steps = page.evaluate(STEP + "([0, 1, 2, 0, 2, 1])")
        with capsys.disabled(): print(f"\n  explorer in JupyterLab: a step in {steps[len(steps) // 2]:.0f} ms (at most {steps[-1]:.0f}); load {patience():.1f}")
        assert steps[len(steps) // 2] < 150 * patience()
        before = words(page)
        page.get_by_label("Denoising step").focus(); page.keyboard.press("ArrowLeft"); settle(page)
        assert words(page) != before, "JupyterLab took the slider's arrow key for itself"
        page.get_by_role("tab", name="Follow one number").click()
        page.wait_for_selector(".verdict.ok")
        page.locator(".plot").first.focus(); page.keyboard.press("ArrowDown"); settle(page)
        assert "q of frame 9" in page.locator(".chain").inner_text(), "JupyterLab took the arrow key for itself"

        page.get_by_role("tab", name="What if").click()
        page.get_by_label("Window").select_option("0"); page.get_by_role("button", name="Run again").click()
        page.wait_for_selector(".result .big", timeout=60_000)
        assert float(page.locator(".result .big").inner_text().split()[0]) > 0
        page.get_by_role("tab", name="Known answers").click()
        page.get_by_role("button", name="Check again").click(); settle(page)
        assert page.locator(".card .pass").count() == 3

        run_cell(page, 2)
        assert "[4, 4] True" in page.locator(".jp-Cell").nth(2).inner_text(), "what the reader clicked did not reach Python"
        page.evaluate("jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
        page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
        page.wait_for_function("getComputedStyle(document.querySelector('.attention-explorer')).colorScheme === 'dark'")
        assert sum(shade(page)[0]) < 180 < 3 * 180 < sum(shade(page)[1])
        if shots := os.environ.get("EXPLORER_SHOTS"): page.locator(".attention-explorer").screenshot(path=f"{shots}/lab.png")
