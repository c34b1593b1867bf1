"""The notebooks are in order: the package is their export, they keep the house rules, and each of them runs."""
from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyflakes import checker, messages

from measure import CELL_LIMIT, MARK, MARK_TEXT, ROOT, chapters, cores, run

PACKAGE = ROOT / "animatediff_lit"
NOTEBOOKS = chapters()
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.stem not in ("__init__", "_modidx"))

# The book in reading order, and the module that each chapter exports. A module imports only modules that stand above it.
BOOK = {
    "00_tour": None, "01_video": "video", "02_diffusion": "diffusion", "03_latents": "latents", "04_blocks": "blocks",
    "05_spatial": "spatial", "06_temporal": "temporal", "07_motion": "motion", "08_unet": "unet", "09_sampling": "pipeline", "09b_evaluation": "evaluation",
    "10_training": "training", "10b_levers": "levers", "11_attention_maps": "attention_maps", "12_memory": "memory", "13_debugging": "debugging",
    "14_checkpoints": "checkpoints", "15_lora": "lora", "16_custom_motion": "custom_motion", "17_speed": "speed", "17b_benchmark": "benchmark",
    "17c_few_steps": "few_steps",
    "18_long_video": "long_video", "19_control": "control", "20_paper_claims": None, "21_contributing": "doctor",
}
ORDER = [module for module in BOOK.values() if module]

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)


# ---- reading a notebook
def cells(notebook: Path, kind: str) -> list[dict]:
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    return [{**c, "source": "".join(c["source"])} for c in nb["cells"] if c["cell_type"] == kind]


def is_directive(line: str) -> bool:
    return re.match(r"\s*#\s*\|", line) is not None


def code_lines(cell: dict) -> list[str]:
    return [line for line in cell["source"].splitlines() if line.strip() and not is_directive(line)]


def statements(cell: dict) -> list[ast.stmt]:
    "The cell's Python, without IPython's own lines."
    if cell["source"].lstrip().startswith("%%"): return []
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in cell["source"].splitlines())).body


def first_line(cell: dict) -> str:
    return next(iter(code_lines(cell)), "(empty)").strip()


def package_imports(tree: ast.AST) -> set[str]:
    "The modules of the package that `tree` imports, at any depth."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["animatediff_lit" if node.level else None, node.module]))
            names = [f"{base}.{a.name}" for a in node.names] if base == "animatediff_lit" else [base]
        else: continue
        found |= {n.split(".")[1] for n in names if n.startswith("animatediff_lit.")}
    return found & set(ORDER)


# ---- the package is what the notebooks export
def test_there_are_notebooks():
    assert NOTEBOOKS, "nbs/ holds no notebook"
    unknown = [p.stem for p in NOTEBOOKS if p.stem not in BOOK]
    assert not unknown, f"{unknown}: a chapter must be in the table BOOK of this test, with the module it exports"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    "A copy of the notebooks, cleaned and exported anew; the package in it starts with `__init__.py` alone."
    copy = tmp_path_factory.mktemp("fresh")
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "animatediff_lit").mkdir()
    shutil.copy(PACKAGE / "__init__.py", copy / "animatediff_lit")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"XDG_CONFIG_HOME": str(copy)}
    for command in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return copy


def test_package_is_the_export(fresh):
    made = {p.relative_to(fresh) for p in (fresh / "animatediff_lit").rglob("*.py")}
    there = {p.relative_to(ROOT) for p in PACKAGE.rglob("*.py")}
    wrong = [f"{p} is exported by no notebook: delete it, or the notebook is missing" for p in sorted(there - made)]
    wrong += [f"{p} is missing: run nbdev-export" for p in sorted(made - there)]
    wrong += [f"{p} differs from its notebook: change the notebook, never the module, then run nbdev-export"
              for p in sorted(made & there) if (fresh / p).read_text(encoding="utf-8") != (ROOT / p).read_text(encoding="utf-8")]
    assert not wrong, "\n".join(wrong)


@each_notebook
def test_is_clean(notebook, fresh):
    cleaned = fresh / "nbs" / notebook.name
    assert cleaned.read_bytes() == notebook.read_bytes(), f"{notebook.name} is not clean: run nbdev-clean"


@each_notebook
def test_exports_its_module(notebook):
    code = "\n".join(c["source"] for c in cells(notebook, "code"))
    into = re.findall(r"^\s*#\s*\|\s*default_exp\s+(\S+)", code, re.M)
    elsewhere = re.findall(r"^\s*#\s*\|\s*exports?i?:?[ \t]+(\S+)", code, re.M)
    exports = re.search(r"^\s*#\s*\|\s*exports?i?\b", code, re.M) is not None
    module = BOOK.get(notebook.stem)
    assert into == ([module] if module else []), f"{notebook.name} should export {module}, its default_exp says {into}"
    assert not elsewhere, f"{notebook.name} exports cells into {elsewhere}: a chapter exports its own module only"
    assert exports == bool(module), f"{notebook.name} exports {'something' if exports else 'nothing'}, and its module is {module}"


@each_module
def test_module_is_in_the_book(module):
    assert module.parent == PACKAGE and module.stem in ORDER, f"{module.relative_to(ROOT)} belongs to no chapter of the table BOOK"


@each_module
def test_module_imports_earlier_chapters_only(module):
    own = ORDER.index(module.stem) if module.stem in ORDER else 0
    later = package_imports(ast.parse(module.read_text(encoding="utf-8"))) - set(ORDER[:own])
    assert not later, f"{module.name} imports {sorted(later)}, which no earlier chapter builds"


@each_notebook
def test_notebook_imports_earlier_chapters_only(notebook):
    module = BOOK.get(notebook.stem)
    if not module: return  # the tour and the closing chapters use the whole package
    used = set().union(*(package_imports(s) for c in cells(notebook, "code") for s in statements(c)))
    later = used - set(ORDER[:ORDER.index(module)])
    assert not later, f"{notebook.name} imports {sorted(later)}, which no earlier chapter builds"


@each_module
def test_module_needs_no_name_of_its_notebook(module):
    source = module.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape such as "\\d" is a warning of the compiler
        tree = compile(source, module.name, "exec", ast.PyCF_ONLY_AST)
    kinds = (messages.UndefinedName, messages.UndefinedExport, messages.UndefinedLocal)
    wrong = [str(m) for m in checker.Checker(tree, filename=module.name).messages if isinstance(m, kinds)]
    assert not wrong, "names that only the notebook has, or nobody:\n" + "\n".join(wrong)


def test_modules_import_without_warnings(tmp_path):
    "In a fresh process, outside the repository; warnings of other packages do not count."
    names = [f"animatediff_lit.{p.stem}" for p in MODULES]
    code = "import importlib, warnings\nwarnings.filterwarnings('error', module='animatediff_lit')\n"
    code += "\n".join(f"importlib.import_module({n!r})" for n in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the house rules
@each_notebook
def test_size(notebook):
    kb = notebook.stat().st_size / 1000
    assert kb <= 400, f"{notebook.name} has {kb:.0f} KB, 400 are allowed: fewer or smaller pictures"


@each_notebook
def test_outputs(notebook):
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    assert "widgets" not in nb["metadata"], f"{notebook.name} holds widget state: clear it and save again"
    code = cells(notebook, "code")
    outputs = [(c, o) for c in code for o in c["outputs"]]
    assert outputs, f"{notebook.name} has no outputs: run python tests/measure.py --save nbs/{notebook.name}"
    errors = [first_line(c) for c, o in outputs if o["output_type"] == "error"]
    assert not errors, f"{notebook.name} shows a traceback below: {errors}"
    widgets = [first_line(c) for c, o in outputs if any("widget" in kind for kind in o.get("data", {}))]
    assert not widgets, f"{notebook.name} holds widget views, which show nothing when it is opened, below: {widgets}"


@each_notebook
def test_pictures_keep_their_size(notebook):
    "nbdev draws at twice the resolution and notes the size to show; without the note the picture comes out twice as large."
    for c in cells(notebook, "code"):
        for o in c["outputs"]:
            png = o.get("data", {}).get("image/png")
            if not png: continue
            pixels = int.from_bytes(base64.b64decode("".join(png))[16:20], "big")
            shown = o.get("metadata", {}).get("image/png", {}).get("width", pixels)
            assert shown <= 1000, f"{notebook.name}: a picture {shown} pixels wide, wider than a page, below: {first_line(c)}"


@each_notebook
def test_cells_are_short(notebook):
    lengths = [len(code_lines(c)) for c in cells(notebook, "code")]
    long = sum(n > 20 for n in lengths)
    assert statistics.median(lengths) <= 5, f"{notebook.name}: half of its code cells have more than {statistics.median(lengths):g} lines, 5 is the limit"
    assert long <= len(lengths) / 10, f"{notebook.name}: {long} of {len(lengths)} code cells have more than 20 lines, one in ten may"
    assert max(lengths) <= 40, f"{notebook.name}: a code cell has {max(lengths)} lines, 40 is the limit"


@each_notebook
def test_imports_have_their_own_cells(notebook):
    for c in cells(notebook, "code"):
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements(c)}
        assert kinds != {True, False}, f"{notebook.name}: imports and other code in one cell: {first_line(c)}"


@each_notebook
def test_pictures_in_the_text_have_alt_text(notebook):
    for c in cells(notebook, "markdown"):
        text = re.sub(r"```.*?```|`[^`]*`", "", c["source"], flags=re.S)
        bare = [m[0] for m in re.finditer(r"!\[\s*\]\([^)]*\)", text)]
        bare += [m[0] for m in re.finditer(r"<img\b[^>]*>", text) if not re.search(r"""\balt=(?:"[^"]*\w|'[^']*\w)""", m[0])]
        assert not bare, f"{notebook.name}: no alt text in {[b[:80] for b in bare]}"


@each_notebook
def test_card_has_measured_cost(notebook):
    lines = [line for c in cells(notebook, "markdown") for line in c["source"].splitlines() if MARK in line]
    how = f"run python tests/measure.py nbs/{notebook.name}"
    assert len(lines) == 1, f"{notebook.name} needs one line in its card that ends in {MARK}, it has {len(lines)}; then {how}"
    found = MARK_TEXT.search(lines[0])
    assert found, f"{notebook.name}: nothing measured stands behind {MARK}: {how}"
    assert int(found[1]) <= 120, f"{notebook.name} takes {found[1]} CPU seconds, and two minutes are the limit"


# ---- every notebook runs
def kinds_of_output(cell: dict) -> set[str]:
    "The media types below a cell, printed text included, warnings and progress bars not."
    return {kind for o in cell["outputs"] for kind in (o["data"] if "data" in o else [o.get("name", o["output_type"])])} - {"stderr"}


def stale_cells(kept: Path, new: Path) -> list[str]:
    "The cells of `kept` that lack a picture or text which the run `new` gives, or hold one which it does not give."
    pairs = zip(cells(kept, "code"), cells(new, "code"), strict=True)
    return [f"{sorted(kinds_of_output(a) ^ kinds_of_output(b))} below: {first_line(a)}" for a, b in pairs if kinds_of_output(a) != kinds_of_output(b)]


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    "The run of every notebook that was chosen, as many at a time as there are cores, with one thread each."
    chosen = [item.callspec.params["notebook"] for item in request.session.items if getattr(item, "function", None) is test_runs]
    pool = ThreadPoolExecutor(cores())
    yield {n: pool.submit(run, n, tmp_path_factory.mktemp(n.stem), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") for n in chosen}
    pool.shutdown(cancel_futures=True)


@each_notebook
def test_runs(notebook, runs, costs):
    cost, copy = runs[notebook].result()
    costs.append(cost)
    if not cost.passed: pytest.fail(f"{notebook.name} failed (a cell may take {CELL_LIMIT} s):\n{cost.log[-6000:]}", pytrace=False)
    stale = stale_cells(notebook, copy)
    cost.passed = not stale
    assert not stale, (f"{notebook.name} does not hold the outputs of a run, they differ in {stale}\n"
                       f"Run python tests/measure.py --save nbs/{notebook.name}")
