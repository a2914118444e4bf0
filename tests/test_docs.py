"""The documentation: its code runs, its links lead somewhere, and the site builds."""

import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from documents import ROOT, blocks, make_user, prose, run, save, skip_without_kvasir

import flax_unet
from flax_unet_cli import train

DOCS = ROOT / "docs"
#: Pages whose code runs here, in this order: later ones use what earlier ones have trained.
GUIDES = (
    "index.md",
    "training.md",
    "your-data.md",
    "classes.md",
    "large-pictures.md",
    "deployment.md",
    "scaling.md",
    "kvasir.md",
    "python.md",
)
#: Pages whose trainings stop after the summary of the data.
DRY = {"your-data.md", "classes.md", "scaling.md", "kvasir.md"}
SHELL = [
    pytest.param(page, code, id=f"{page}-{code.strip().splitlines()[-1][:40]}")
    for page in GUIDES
    for code in blocks(DOCS / page, "bash")
]
PYTHON = [page for page in GUIDES if blocks(DOCS / page, "python")]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user with all the folders that the pages draw."""
    folder, env = make_user(tmp_path_factory.mktemp("user"))
    rng, names = np.random.default_rng(0), [f"{i:02}" for i in range(6)]
    disc = (np.hypot(*(np.indices((32, 32)) - 15.5)) < 9).astype(np.uint8)
    picture = (rng.integers(0, 100, (32, 32, 3)) + 100 * disc[..., None]).astype(np.uint8)
    halves = disc * (np.arange(32) < 16), disc * (np.arange(32) >= 16)
    colours = np.array([[0, 0, 0], [128, 64, 128], [0, 0, 142], [255, 255, 255]], np.uint8)
    road_and_car = colours[halves[0] + 2 * halves[1]]
    road_and_car[0] = colours[3]
    for i, name in enumerate(names):
        pairs = {
            "streets": (picture, road_and_car),
            "camera": (picture[..., 0].astype(np.uint16) * 16, disc * 255),
            "large": (np.tile(picture, (4, 3, 1)), np.tile(disc, (4, 3)) * 255),
            f"set/{('train', 'val', 'test')[i % 3]}": (picture, disc * 255),
        }
        for place, (image, mask) in pairs.items():
            save(folder / place / "images" / f"{name}.png", image)
            save(folder / place / "masks" / f"{name}.png", mask)
        for part, array in (("images", picture), ("masks", disc * 255)):
            save(folder / "patients" / part / f"patient{i // 2}_{name}.png", array)
        save(folder / "slides" / f"{name}.png", picture)
        save(folder / "slides" / f"{name}_mask.png", disc * 255)
        save(folder / "tissue" / "images" / f"{name}.png", picture)
        save(folder / "tissue" / "masks" / "gland" / f"{name}.png", halves[0] * 255)
        if i % 2:
            save(folder / "tissue" / "masks" / "vessel" / f"{name}.png", halves[1] * 255)
        save(folder / "nuclei" / name / "images" / f"{name}.png", picture)
        for j, half in enumerate(halves):
            save(folder / "nuclei" / name / "masks" / f"{j}.png", half * 255)
    for page in GUIDES:
        titled = re.findall(r'```json title="(.*?)"\n(.*?)```', (DOCS / page).read_text(), re.S)
        for name, content in titled:
            (folder / name).write_text(content)
    # Programs are compiled for one short use.
    return folder, env | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def reports(folder):
    """The reports of evaluations, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in folder.glob("runs/**/evaluation-*.json")}


@pytest.mark.filterwarnings("default::UserWarning")  # which a user reads
@pytest.mark.parametrize("page, code", SHELL)
def test_commands(page, code, user, monkeypatch, capfd):
    skip_without_kvasir(code, user)
    folder, env = user
    before = reports(folder)
    if page in DRY and "flax-unet train" in code:  # in this process, to save its start
        monkeypatch.chdir(folder)
        for name in {"XDG_CACHE_HOME", "TFDS_DATA_DIR", "KVASIR_SEG_ZIP"} & env.keys():
            monkeypatch.setenv(name, env[name])
        for words in map(shlex.split, code.replace("\\\n", "").splitlines()):
            if words[0] == "flax-unet":
                assert train.main([*words[2:], "--dry-run"]) == 0
        output = capfd.readouterr().out
    else:
        output = run(["bash", "-e", "-c", code], user)
    if "flax-unet predict" in code:
        out = re.findall(r"--out (\S+)", code)[-1]
        assert len(list((folder / out).glob("*-mask.png"))) >= 3
    if "flax-unet evaluate" in code:
        assert reports(folder) != before
    if "runs/look" in code:  # what the page says that it prints
        (shown,) = [text for text in blocks(DOCS / page, "text") if "empty masks" in text]
        assert {*shown.splitlines()} <= {*output.splitlines()}


@pytest.mark.parametrize("page", PYTHON)
def test_python(page, user):
    """All blocks of a page in one process, each one by itself."""
    codes = blocks(DOCS / page, "python")
    skip_without_kvasir("\n".join(codes), user)
    script = f"for code in {codes!r}:\n    exec(compile(code, {page!r}, 'exec'), {{}})\n"
    output = run([sys.executable, "-c", script], user)
    found = re.findall(r"^Dice (\S+)$", output, re.M)
    assert all(float(value) > 0.5 for value in found)
    assert bool(found) == ('print("Dice"' in "\n".join(codes))


def documents():
    """The documents that people read on GitHub, too."""
    files = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("models/*/README.md")]
    return sorted(files)


def anchors(file):
    """The anchors that GitHub makes of the headings of a document."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(file), re.M):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def broken_links(file):
    """The relative links of a document that lead to no file, or to no heading of one."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        path, _, heading = target.partition("#")
        if ":" in target:
            continue
        to = (file.parent / path).resolve() if path else file
        made = to.relative_to(DOCS).parts[0] == "api" if to.is_relative_to(DOCS) else False
        if not to.exists() or (heading and not made and heading not in anchors(to)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    assert broken_links(file) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.md").write_text("# One, `two`\n\n[x](b.md) [y](#one-two) [z](#one) <http://a>\n")
    assert broken_links(tmp_path / "a.md") == ["b.md", "#one"]


def test_every_module_has_its_place_in_the_api():
    named = [
        name
        for file in DOCS.glob("api/*.md")
        for name in re.findall(r"^::: (\S+)$", file.read_text(), re.M)
    ]
    modules = [f"flax_unet.{module.name}" for module in pkgutil.iter_modules(flax_unet.__path__)]
    assert sorted(name for name in named if name.startswith("flax_unet.")) == sorted(modules)
    assert all(importlib.util.find_spec(name) for name in named)


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning is an error."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_all_pages_and_an_index_for_searching(site):
    pages = {str(file.relative_to(site)) for file in site.rglob("*.html")}
    assert pages > {"index.html", "results.html", "contributing.html", "models/strong.html"}
    assert "your-data.html" in (site / "search" / "search_index.json").read_text()
    assert not list(site.rglob("*.py"))  # what draws the pictures is no page


def test_docstrings_are_rendered(site):
    page = (site / "api" / "losses-and-metrics.html").read_text()
    assert 'id="flax_unet.losses.bce"' in page
    assert "&gt;&gt;&gt; " not in re.sub(r"<pre.*?</pre>", "", page, flags=re.S)
    assert "<blockquote>" not in page


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture
def address(site):
    """The address of a server of the site on this machine."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_site_loads_nothing_from_elsewhere(site, address, browser):
    page, elsewhere = browser.new_page(), []

    def only_from_here(route):
        if (url := route.request.url).startswith(address):
            return route.continue_()
        elsewhere.append(url)
        return route.abort()

    page.route("**/*", only_from_here)
    for file in sorted(site.rglob("*.html")):
        page.goto(f"{address}{file.relative_to(site)}")
    page.goto(f"{address}index.html?q=overlapping+classes")  # searches in a worker
    page.wait_for_selector(".md-search-result__item", state="attached", timeout=60_000)
    page.close()
    assert elsewhere == []
