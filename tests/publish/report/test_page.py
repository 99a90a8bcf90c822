"""The report, looked at with a real browser; the checkpoints are real, the results about invented questions."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.publish import results
from w8a8.publish.report import write as reports
from w8a8.publish.report.facts import Report
from w8a8.publish.report.page import SHOWN_CHARACTERS
from w8a8.publish.report.write import Written

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    "</pre></style></details><img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">",
    "\u202e desrever \u2066 \x00 {{ 7 * 7 }} {% raw %} &amp; <!-- ]]>",
    "x" * 100_000,
)
LAYERS, PROJECTIONS = 18, 7


@dataclass(frozen=True)
class Made:
    """A report that was written, and what it shows."""

    report: Report
    written: Written

    @property
    def url(self) -> str:
        return self.written.page.resolve().as_uri()


@pytest.fixture(scope="module")
def made(gemma3: Path, gemma3_formats: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The report on the real Gemma 3 270M, with all results; the first answers that flipped are hostile."""
    folder = tmp_path_factory.mktemp("report")
    base, quant = results.pair(400)
    flipped = [i for i, (a, b) in enumerate(zip(base, quant, strict=True)) if a != b]
    answers = dict(zip(flipped, HOSTILE, strict=False))
    job = reports.prepare(
        gemma3_formats["quark"],
        gemma3,
        baseline=results.write(folder / "base.json", results.gsm8k(HOSTILE[0], base, answers)),
        quant=results.write(folder / "quant.json", results.gsm8k("gemma-3-270m-W8A8", quant)),
        kld=results.write(folder / "kld.json", results.kld() | {"candidate": HOSTILE[1]}),
    )
    report = reports.run(job)
    return Made(report, reports.write(report, folder / "report.html", folder / "figures"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light") as context:
        yield context.new_page()


def background(page: Page) -> list[int]:
    """The colour of the page behind everything, as [red, green, blue]."""
    found = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in found.removeprefix("rgb(").removesuffix(")").split(",")]


def boxes(page: Page, selector: str) -> list[tuple[float, float]]:
    """Width and height of every element, in pixels, as laid out."""
    script = "all => all.map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
    return [(width, height) for width, height in page.eval_on_selector_all(selector, script)]


def test_the_page_asks_for_nothing_but_itself_and_has_nothing_to_complain_of(made: Made, page: Page) -> None:
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(made.url)
    for details in page.query_selector_all("details"):
        details.evaluate("e => e.open = true")
    page.wait_for_load_state("networkidle")
    assert (set(asked) - {"data:,"}, said) == ({made.url}, [])
    html = made.written.page.read_text()
    assert "<script>" not in html
    assert "default-src 'none'" in html


def test_every_layer_and_projection_has_a_cell_with_its_own_number(made: Made, page: Page) -> None:
    page.goto(made.url)
    cells = page.eval_on_selector_all(".heat .cell", "all => all.map(e => [e.title, e.dataset.sqnr, e.innerText])")
    assert made.report.errors is not None
    expected = {t.name: t.sqnr_db for t in made.report.errors.tensors}
    assert len(cells) == len(expected) == LAYERS * PROJECTIONS
    for title, exact, text in cells:
        layer, projection = title.partition(":")[0].removeprefix("layer ").split(" ")
        value = expected[f"model.layers.{layer}.{projection}.weight"]
        assert (float(exact), text) == (value, f"{value:.1f}")
    assert all(width > 20 and height > 15 for width, height in boxes(page, ".heat .cell"))


def test_a_worse_cell_is_darker(made: Made, page: Page) -> None:
    page.goto(made.url)
    script = "all => all.map(e => [Number(e.dataset.sqnr), getComputedStyle(e).backgroundColor])"
    found = sorted(page.eval_on_selector_all(".heat .cell", script))
    light = [sum(map(int, colour[4:-1].split(","))) for _, colour in found]
    assert light[0] < light[len(light) // 2] < light[-1]


@pytest.mark.parametrize(
    ("selector", "least"),
    [
        ("#size .bar i", 7),
        (".ridge path", PROJECTIONS),
        ("#worst .dot", 12),
        ("#gsm8k .whisker", 4),
        ("#gsm8k .paired i", 4),
        ("#kld .histogram i", 20),
        ("#kld .positions i", 8),
    ],
)
@pytest.mark.parametrize("width", [390, 1200])
def test_charts_draw(made: Made, page: Page, selector: str, least: int, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(made.url)
    assert sum(w > 0.5 and h > 0.5 for w, h in boxes(page, selector)) >= least


def test_sizes_are_drawn_to_scale(made: Made, page: Page) -> None:
    page.goto(made.url)
    script = (
        "all => Object.fromEntries(all.map(e => [e.parentNode.ariaLabel + e.title, e.getBoundingClientRect().width]))"
    )
    found = page.eval_on_selector_all("#size .bar i", script)
    width = {key.split(":")[0] + " " + key.split(" MB")[1].split(":")[0]: w for key, w in found.items() if " MB" in key}
    sizes = {row.component: row for row in made.report.sizes}
    mlp = sizes["mlp"]
    assert mlp.before is not None
    assert width["after mlp"] / width["before mlp"] == pytest.approx(mlp.after / mlp.before, abs=0.02)
    assert width["after embeddings"] == pytest.approx(width["before embeddings"])


def test_text_says_what_the_data_say(made: Made, page: Page) -> None:
    page.goto(made.url)
    assert made.report.baseline is not None
    assert made.report.quant is not None
    assert page.inner_text("h1") == made.report.headline
    assert "41.3 dB SQNR" in made.report.headline
    scores = page.eval_on_selector_all("#gsm8k .value", "all => all.map(e => Number(e.dataset.value))")
    first, second = made.report.baseline, made.report.quant
    assert scores == [s.value for r in ("strict", "flexible") for s in (getattr(first, r), getattr(second, r))]
    assert made.report.paired is not None
    assert made.report.paired.verdict in page.inner_text("#gsm8k")
    assert "0.0286 nats" in page.inner_text("#kld")
    assert len(page.query_selector_all(".flip")) == len(made.report.paired.flips)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(made: Made, browser: Browser) -> None:
    with browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True) as context:
        page = context.new_page()
        page.goto(made.url)
        for details in page.query_selector_all("details"):
            details.evaluate("e => e.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        first, last = (
            page.eval_on_selector_all(".heat .cell", "c => c.map(e => e.getBoundingClientRect().top)")[i]
            for i in (0, LAYERS - 1)
        )
        assert last - first > 15 * (LAYERS - 1)  # layers go down, so that every number keeps its size
        assert all(width > 24 for width, _ in boxes(page, ".heat .cell"))


def test_it_follows_the_readers_scheme_and_prints_light(made: Made, page: Page) -> None:
    page.goto(made.url)
    assert min(background(page)) > 200
    page.emulate_media(color_scheme="dark")
    assert max(background(page)) < 60
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(29, 32, 38)"
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == [255, 255, 255]
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(0, 0, 0)"


def test_what_a_model_said_is_shown_and_does_nothing(made: Made, page: Page) -> None:
    page.goto(made.url)
    shown = page.eval_on_selector_all(".flip pre", "all => all.map(e => e.textContent)")
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2].replace("\0", "")} <= set(shown)
    long = next(text for text in shown if text.startswith("xxx"))
    assert long == "x" * SHOWN_CHARACTERS + f"\n… {100_000 - SHOWN_CHARACTERS:,} characters more"
    assert page.query_selector_all("script, img, iframe, object, body > style") == []
    assert page.title() == f"{made.report.name}: W8A8 report"
    assert len(page.query_selector_all("style")) == 1


@pytest.mark.parametrize("name", ["size", "sqnr", "worst", "scales", "gsm8k", "kld"])
def test_figures_are_pictures(made: Made, name: str) -> None:
    path = next(path for path in made.written.figures if path.stem == name)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1600
        assert 300 <= image.height <= 1600
        pixels = np.asarray(image.convert("RGB"))
    assert 0.02 < (pixels < 250).any(axis=2).mean() < 0.9
    assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 20


def test_without_source_and_results_it_shows_the_rest_and_says_so(golden: Path, page: Page, tmp_path: Path) -> None:
    report = reports.run(reports.prepare(golden / "quark-0.13"))
    written = reports.write(report, tmp_path / "new" / "report.html", tmp_path / "figures")
    assert {path.stem for path in written.figures} == {"size", "scales"}
    page.goto(written.page.as_uri())
    assert [e.get_attribute("id") for e in page.query_selector_all("section")] == ["size", "scales"]
    assert "Not measured: errors and sizes of the source (--source)" in page.inner_text("footer")
    assert page.query_selector_all("#size .bar") != []


def test_a_model_whose_layers_differ_has_only_the_cells_there_are(
    gemma4_w8a8: Path, page: Page, tmp_path: Path
) -> None:
    report = reports.run(reports.prepare(gemma4_w8a8))
    assert report.errors is not None
    assert sum(len(stack.cells) for stack in report.stacks) == len(report.errors.tensors)
    assert any(len(stack.cells) < len(stack.layers) * len(stack.projections) for stack in report.stacks)
    written = reports.write(report, tmp_path / "report.html", tmp_path)
    page.goto(written.page.as_uri())
    assert len(page.query_selector_all(".heat .cell")) == len(report.errors.tensors)


def test_a_checkpoint_that_fails_says_so_first(gemma4: Path, gemma4_w8a8: Path, page: Page, tmp_path: Path) -> None:
    out = shutil.copytree(gemma4_w8a8, tmp_path / "W8A8")
    shard = max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1000:] = bytes(1000)
    shard.write_bytes(data)
    written = reports.write(reports.run(reports.prepare(out, gemma4)), tmp_path / "report.html", tmp_path)
    page.goto(written.page.as_uri())
    assert page.inner_text("section:first-of-type h2").startswith("FAILED")
