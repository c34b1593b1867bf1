"""The memory explorer: its laws and its logic without a browser, its page in a browser without a network, and the widget in JupyterLab."""
from __future__ import annotations

import base64
import io
import os
import re
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from animatediff_lit.memory import CARDS, RESERVE, SETTING, TRAINED, MemoryExplorer, estimate_memory, forecast, frames_that_fit, judge
from animatediff_lit.memory import law, marking_primes, memory_book, memory_laws, options_of, power_of, shape_law, variant_key
from animatediff_lit.unet import UNet3DConditionModel
from explorers import browser, lab, lab_page, offline_page, run_cell, sentence  # noqa: F401  (two of them are fixtures)

READY = ".mx[data-drawn]"

TINY = dict(block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            norm_num_groups=4, cross_attention_dim=24, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=20)


@pytest.fixture(scope="module")
def book() -> dict:
    return memory_book()


@pytest.fixture
def explorer() -> MemoryExplorer:
    return MemoryExplorer()


# ---- the laws
def test_law_of_a_block():
    assert law(2 * 17 * 13 ** 2 * 320, (17, 13)) == [0, 0, 0, 640, 0, 0] and law(77 * 4, (17, 13))[0] == 308
    assert law(8 * 17 * 13 ** 4, (17, 13))[4] == 8 and law(8 * 17 ** 2 * 13 ** 2, (17, 13))[5] == 8
    assert shape_law((34, 13 * 13 * 64, 320), (17, 13)) == [[2, 1, 0], [64, 0, 2], [320, 0, 0]] and power_of(17, 0) == 0
    assert "estimate_memory" in sentence(lambda: law(17 ** 3, (17, 13)))


def test_primes_that_divide_no_width():
    unet = SimpleNamespace(parameters=lambda: iter([torch.empty(17, 26)]), config=SimpleNamespace(motion_max_seq_length=32))
    assert marking_primes(unet, tokens=77) == (19, 23)
    unet.config.motion_max_seq_length = 16
    assert "estimate_memory" in sentence(lambda: marking_primes(unet))


@pytest.mark.parametrize("model, changes", [
    ("nano", dict(frames=5, size=56, guidance=True)), ("nano", dict(frames=32, size=16, guidance=False, dtype="float32")),
    ("nano", dict(frames=9, size=40, training=True, optimizer="sgd")),
    ("nano", dict(frames=3, size=64, training=True, trained="motion modules", checkpointing=True, dtype="float32")),
    ("sd15-v2", dict(frames=11, size=576)), ("sd15-v2", dict(frames=16, size=512, training=True, trained="motion modules", checkpointing=True))],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_shipped_laws_say_what_an_estimate_says(book, model, changes):
    "To the byte, in every layer. If the networks or the accounting changed, `animatediff_lit.memory.save_laws()` writes the file anew."
    setting = {**SETTING, "model": model, **changes}
    told, traced = forecast(book, setting), estimate_memory(model, **options_of(setting))
    assert told.moments == traced.moments and told.peak_at == traced.peak_at
    assert sum(b.bytes for b in told.alive) == told.peak
    largest = max((b for b in traced.alive if b.kind == "activations"), key=lambda b: b.bytes)
    if told.moments[told.peak_at].name != "optimizer step": assert any(b.name == largest.name and b.shape == largest.shape for b in told.alive)


def test_laws_of_another_network():
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**TINY)
    unet.set_frozen("spatial")
    part = memory_laws(unet, "mine", dtypes=["float32"], attention=["plain"], trained=["everything"])
    assert part["frames"] == [1, 20] and part["label"] == "mine"
    for changes in (dict(frames=7, size=128), dict(frames=20, size=272, training=True)):
        setting = {**SETTING, "model": "mine", "dtype": "float32", "attention": "plain", **changes}
        assert forecast({"models": {"mine": part}}, setting).moments == estimate_memory(unet, **options_of(setting)).moments


def test_every_peak_is_known(book):
    "The treemap has something to show wherever a slider goes."
    met = total = 0
    for name, part in book["models"].items():
        for key in part["variants"]:
            dtype, attention, how = key.split(", ", 2)
            trained = how.removesuffix(", checkpointing")
            setting = {**SETTING, "model": name, "dtype": dtype, "attention": attention, "training": trained in TRAINED, "guidance": how != "no guidance",
                       "trained": trained if trained in TRAINED else "everything", "checkpointing": how != trained, "optimizer": "sgd"}
            assert variant_key(setting) == key
            for frames, size in product((1, 3, 13, 21, 31), range(part["sizes"][0], part["sizes"][1] + 1, 3 * part["sizes"][2])):
                found = forecast(book, {**setting, "frames": frames, "size": size})
                total, met = total + 1, met + (found.alive[-1].name != "all layers")
                assert sum(b.bytes for b in found.alive) == found.peak
    assert met / total > 0.97, f"at {total - met} of {total} settings nothing is known about what is alive"


# ---- the logic
def test_frames_that_fit(book):
    setting = {**SETTING, "model": "sd15-v2", "training": True, "trained": "motion modules"}
    most, taken = frames_that_fit(book, setting), lambda n: forecast(book, {**setting, "frames": n}).peak + RESERVE
    assert list(most) == list(CARDS) and len(set(most.values())) > 2
    for card, n in most.items():
        assert n == 0 or taken(n) <= CARDS[card]
        assert n == 32 or taken(n + 1) > CARDS[card]


def test_exercise(book):
    task = book["exercise"]
    start = judge(book, task["start"])
    assert not start.passed and start.turned == [] and start.wrong == []
    part, counts = book["models"]["sd15-v2"], []
    for dtype, trained, checkpointing, optimizer in product(part["dtypes"], part["trained"], (False, True), ("adamw", "sgd")):
        setting = {**task["start"], "dtype": dtype, "trained": trained, "checkpointing": checkpointing, "optimizer": optimizer}
        verdict, fits = judge(book, setting), forecast(book, setting).peak + RESERVE <= 16 * 2 ** 30
        assert verdict.passed == fits and len(verdict.turned) == sum(setting[k] != task["start"][k] for k in setting)
        if fits: counts.append(len(verdict.turned))
    assert min(counts) == task["fewest"] > 1, "one switch would be no exercise"
    for cheat in ({"frames": 4}, {"size": 256}, {"training": False}):
        verdict = judge(book, {**task["start"], "dtype": "float16", "checkpointing": True, "trained": "motion modules", **cheat})
        assert not verdict.passed and verdict.wrong == list(cheat)


@pytest.mark.parametrize("change, says", [
    ({"frames": 33}, "1 to 32"), ({"frames": 2.5}, "1 to 32"), ({"size": 500}, "multiple of 64"), ({"dtype": "int8"}, "'float16' or 'float32'"), ({"model": "sd"}, "sd15-v2"),
    ({"attention": "flash"}, "'fused'"), ({"guidance": 7.5}, "True or False"), ({"trained": "all"}, "motion modules"), ({"colour": "red"}, "A setting has")], ids=str)
def test_bad_settings_get_a_sentence(explorer, change, says):
    before = explorer.a
    assert says in sentence(lambda: setattr(explorer, "a", {**explorer.a, **change}), (ValueError, TypeError))
    assert explorer.a == before
    assert says in sentence(lambda: MemoryExplorer(compare=change), (ValueError, TypeError, KeyError))


def test_settings_are_traits(explorer):
    heard = []
    explorer.observe(lambda change: heard.append(change.name), ["a", "b"])
    explorer.a = {**explorer.a, "frames": 24}
    explorer.b = {**explorer.a, "training": True}
    assert heard == ["a", "b"] and explorer.forecast("b").gradients > 0 == explorer.forecast("a").gradients
    assert len(explorer.summary.splitlines()) == 2 and "24 frames" in explorer.summary
    explorer.b = {}
    assert explorer.check().wrong == ["frames", "training"] and len(explorer.summary.splitlines()) == 1


def test_the_kernel_answers(explorer):
    explorer.a = {**explorer.a, "model": "nano", "size": 32}
    explorer.ask = explorer.a
    assert explorer.exact["settings"] == explorer.a and explorer.exact["peak"] == explorer.forecast().peak and explorer.exact["seconds"] > 0


# ---- what a cell leaves
def test_no_widget_in_saved_notebooks(explorer, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    data = explorer._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"} and data["text/plain"] == explorer.summary
    assert 300 < Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width <= 1000


def test_a_kernel_shows_both(explorer, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(explorer._repr_mimebundle_()[0])


# ---- the page, in a browser, as a file and without a network
@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return MemoryExplorer().to_html(tmp_path_factory.mktemp("page") / "memory.html")


@pytest.fixture
def page(browser, written):  # noqa: F811
    with offline_page(browser, written, READY, timeout=20_000) as page: yield page


def words(page, side: str = "a") -> str: return page.locator(f".mx-{side} .mx-summary").inner_text()
def control(page, key: str, side: str = "a"): return page.locator(f".mx-{side} [data-key={key}]")


def choose(page, key: str, value, side: str = "a") -> None:
    where = control(page, key, side)
    if isinstance(value, bool): where.set_checked(value)
    elif isinstance(value, str): where.select_option(value)
    else: where.fill(str(value))


STEP = """async values => {
  const slider = document.querySelector('.mx-a [data-key=frames]'), times = [];
  for (const value of values) {
    const start = performance.now();
    slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true }));
    await new Promise(done => requestAnimationFrame(() => { const { port1, port2 } = new MessageChannel(); port1.onmessage = done; port2.postMessage(0); }));
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b);
}"""


def test_page_names_no_address(written):
    text = written.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"} and "import " not in text


def test_page_is_quick(browser, written, capsys):  # noqa: F811
    context, opened = browser.new_context(offline=True), []
    for _ in range(3):                                          # the best of three: other work on the machine only adds
        page, start = context.new_page(), time.perf_counter()
        page.goto(written.as_uri()); page.wait_for_selector(READY)
        opened.append(time.perf_counter() - start)
    steps = page.evaluate(STEP, [4, 20, 8, 31, 16, 1, 24])
    context.close()
    with capsys.disabled(): print(f"\n  memory explorer's page: {written.stat().st_size / 1e6:.1f} MB, opens in {min(opened):.2f} s, a step in {steps[3]:.0f} ms (at most {steps[-1]:.0f})")
    assert min(opened) < 2 and steps[3] < 150 and written.stat().st_size < 6e6


def test_controls_do_what_they_say(page, explorer):
    "After each step the page says what Python says about the same setting, and draws another picture."
    assert words(page) == explorer.summary and page.locator(".mx-b").is_hidden() and not page.get_by_role("button", name="Ask the kernel").is_visible()
    for key in ("checkpointing", "trained", "optimizer"): assert control(page, key).is_disabled()
    for key, value in dict(frames=24, size=640, dtype="float32", guidance=False, training=True, trained="motion modules", checkpointing=True, optimizer="sgd").items():
        shown = page.locator(".mx-a svg").inner_html()
        choose(page, key, value)
        explorer.a = {**explorer.a, key: value}
        assert words(page) == explorer.summary, key
        if (key, value) != ("optimizer", "sgd"): assert page.locator(".mx-a svg").inner_html() != shown, f"{key}: the same picture as before"
        if key == "training": assert control(page, "guidance").is_disabled() and control(page, "trained").is_enabled()
    choose(page, "model", "nano")
    explorer.a = {"model": "nano", **explorer.book["models"]["nano"]["start"]}
    assert words(page) == explorer.summary and control(page, "size").get_attribute("max") == "64"


def test_keyboard_alone(page):
    control(page, "frames").focus()
    page.keyboard.press("ArrowRight")
    assert "17 frames" in words(page)
    steps = page.get_by_label("Setting A: go through the modules")
    steps.focus(); page.keyboard.press("End")
    assert page.locator(".mx-a .mx-where").inner_text() == "conv_out" and "conv_out" in steps.get_attribute("aria-valuetext")
    page.locator(".mx-a .mx-peak").focus(); page.keyboard.press("Enter")
    assert page.locator(".mx-a .mx-peak").get_attribute("aria-expanded") == "true"
    page.locator(".mx-a .mx-map [role=option]").first.focus()
    told = page.locator(".mx-a .mx-told")
    seen = [told.inner_text()]
    for _ in range(3): page.keyboard.press("ArrowRight"); seen.append(told.inner_text())
    assert len(set(seen)) == 4 and "parameters" in seen[0], "the largest first"
    page.keyboard.press("Home")
    assert told.inner_text() == seen[0]


def test_treemap_holds_what_is_alive(page, explorer):
    choose(page, "training", True); choose(page, "optimizer", "sgd")
    explorer.a = {**explorer.a, "training": True, "optimizer": "sgd"}
    page.locator(".mx-a .mx-peak").click()
    found, options = explorer.forecast(), page.locator(".mx-a .mx-map [role=option]")
    assert options.count() == len(found.alive) and found.moments[found.peak_at].name in page.locator(".mx-a h4").inner_text()
    box = page.locator(".mx-a .mx-map").bounding_box()
    boxes = [option.bounding_box() for option in options.all()]
    assert all(b["x"] >= box["x"] - 1 and b["y"] >= box["y"] - 1 and b["x"] + b["width"] <= box["x"] + box["width"] + 2 and b["y"] + b["height"] <= box["y"] + box["height"] + 2 for b in boxes)
    share = boxes[0]["width"] * boxes[0]["height"] / (box["width"] * box["height"])
    assert abs(share - max(b.bytes for b in found.alive) / found.peak) < 0.04, "areas are not in proportion"
    page.locator(".mx-a").get_by_text("The same as a table").click()
    assert page.locator(".mx-a details table tbody tr").count() == len(found.alive)
    page.locator(".mx-a .mx-peak").click()
    assert page.locator(".mx-a .mx-map").is_hidden()


def test_cards(page, explorer):
    choose(page, "training", True)
    explorer.a = {**explorer.a, "training": True}
    rows = [row.split("\t") for row in page.locator(".mx-a > table tbody").inner_text().splitlines()]
    most, peak = frames_that_fit(explorer.book, explorer.a), explorer.forecast().peak
    assert [(card, n.split()[0]) for card, _, n in rows] == [(card, str(n or "none")) for card, n in most.items()]
    assert [fits == "fits" for _, fits, _ in rows] == [peak + RESERVE <= size for size in CARDS.values()]


def test_two_settings(page, explorer):
    page.get_by_role("button", name="Compare two settings").click()
    assert page.locator(".mx-b").is_visible() and words(page, "b") == words(page)
    choose(page, "training", True, "b"); choose(page, "frames", 9)
    explorer.b = {**explorer.a, "training": True}
    explorer.a = {**explorer.a, "frames": 9}
    assert [words(page), words(page, "b")] == explorer.summary.splitlines()
    a, b = (page.locator(f".mx-{side}").bounding_box() for side in "ab")
    assert b["x"] > a["x"] + a["width"] - 1 and a["y"] == b["y"], "not side by side"
    scale = [page.locator(f".mx-{side} svg text[text-anchor=end]").all_inner_texts() for side in "ab"]
    assert scale[0] == scale[1], "two pictures with two scales cannot be compared"
    page.set_viewport_size({"width": 600, "height": 900})
    page.wait_for_function("document.querySelector('.mx-b').getBoundingClientRect().left < 100")
    page.get_by_role("button", name="Compare two settings").click()
    assert page.locator(".mx-b").is_hidden()


def test_exercise_in_the_page(page, book):
    verdict, task = page.locator(".mx-verdict"), book["exercise"]
    assert verdict.inner_text().startswith("Not the task yet")
    page.get_by_role("button", name="Set it up").click()
    assert verdict.inner_text().startswith("Fail: ") and "0 switches" in verdict.inner_text()
    part = book["models"]["sd15-v2"]
    options = dict(dtype=part["dtypes"], trained=part["trained"], checkpointing=[False, True], optimizer=["adamw", "sgd"])
    settings = [{**task["start"], **dict(zip(options, values))} for values in product(*options.values())]
    passing = sorted((s for s in settings if judge(book, s).passed), key=lambda s: len(judge(book, s).turned))
    for setting, ending in ((passing[0], "No fewer will do."), (passing[-1], "It can be done with fewer.")):
        for key in options: choose(page, key, setting[key])
        assert verdict.inner_text().startswith("Pass: ") and verdict.inner_text().endswith(ending) and f"{len(judge(book, setting).turned)} switches" in verdict.inner_text()
    choose(page, "frames", 8)
    assert verdict.inner_text().startswith("Not the task yet: set frames to 16")


def test_dark_and_light(browser, written):  # noqa: F811
    shades = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1180, "height": 1000}, offline=True, color_scheme=scheme)
        page = context.new_page()
        page.goto(written.as_uri()); page.wait_for_selector(READY)
        shades[scheme] = page.locator(".mx").evaluate("e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color].map(c => c.match(/\\d+/g).slice(0, 3).reduce((s, n) => s + Number(n), 0) / 3)")
        if shots := os.environ.get("EXPLORER_SHOTS"):
            page.get_by_role("button", name="Set it up").click(); page.get_by_role("button", name="Compare").click()
            choose(page, "checkpointing", True, "b"); page.locator(".mx-b .mx-peak").click()
            page.screenshot(path=f"{shots}/memory_{scheme}.png", full_page=True)
        context.close()
    assert shades["light"][0] > 200 > 80 > shades["light"][1] and shades["dark"][0] < 60 < 180 < shades["dark"][1]


# ---- the widget in JupyterLab
CELLS = ["from animatediff_lit.memory import MemoryExplorer\nexplorer = MemoryExplorer('nano', frames=12)", "explorer",
         "print(explorer.a['frames'], explorer.a['training'], explorer.exact['peak'] == explorer.forecast().peak)"]


def test_widget_in_jupyterlab(lab, browser, capsys):  # noqa: F811
    with lab_page(browser, lab, CELLS, height=1300, timeout=120_000) as page:
        run_cell(page, 0)
        start = time.perf_counter()
        run_cell(page, 1)
        page.wait_for_selector(READY)
        opened = time.perf_counter() - start
        assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        assert page.locator(".jp-OutputArea-output img:visible").count() == 0, "the still picture stands beside the widget"
        steps = page.evaluate(STEP, [4, 20, 8, 31, 16, 1, 24])
        with capsys.disabled(): print(f"\n  memory explorer in JupyterLab: opens in {opened:.2f} s, a step in {steps[3]:.0f} ms (at most {steps[-1]:.0f})")
        assert steps[3] < 150
        control(page, "frames").focus(); page.keyboard.press("ArrowLeft")
        page.wait_for_function("document.querySelector('.mx-a .mx-summary').textContent.includes('23 frames')", timeout=10_000)      # and JupyterLab does not take the key
        choose(page, "training", True)
        page.get_by_role("button", name="Ask the kernel").click()
        page.wait_for_function("document.querySelector('.mx-exact').innerText.includes('the same')")
        run_cell(page, 2)
        assert "23 True True" in page.locator(".jp-Cell").nth(2).inner_text(), "what the reader clicked did not reach Python"
        page.evaluate("jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
        page.wait_for_selector(".mx.mx-dark")
        if shots := os.environ.get("EXPLORER_SHOTS"): page.locator(".mx").screenshot(path=f"{shots}/memory_lab.png")
