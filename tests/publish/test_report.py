"""The report, looked at with a real browser; the checkpoints are real, the results about invented questions."""

import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import w8a8
from tests.command import cli
from tests.publish import results
from w8a8.errors import (
    DiskFullError,
    InvalidResultError,
    MissingExtraError,
    UnsupportedSchemeError,
    UnwritableError,
    UsageError,
)
from w8a8.publish.report import write as reports
from w8a8.publish.report.data import Place, place, short
from w8a8.publish.report.facts import Report
from w8a8.publish.report.page import SHOWN_CHARACTERS, render
from w8a8.publish.report.style import number
from w8a8.publish.report.write import Written
from w8a8.publish.results import read_gsm8k, read_kld

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


def test_the_source_that_lies_beside_is_found_and_no_other(gemma4: Path, gemma4_w8a8: Path, tmp_path: Path) -> None:
    assert reports.prepare(gemma4_w8a8).verification is not None
    moved = shutil.copytree(gemma4_w8a8, tmp_path / "moved" / "W8A8")
    assert reports.prepare(moved).verification is None
    shutil.copytree(gemma4, tmp_path / gemma4.name)
    provenance = json.loads((moved / "w8a8.json").read_text())
    for name in ("..", f"../{gemma4.name}", str(gemma4), "", "no/such-repository"):
        (moved / "w8a8.json").write_text(json.dumps(provenance | {"source": {"name": name}}))
        assert reports.prepare(moved).verification is None


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


def test_what_cannot_be_stored_leaves_the_page_that_was_there(
    plain: tuple[Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = plain
    page, figures = tmp_path / "report.html", tmp_path / "figures"
    page.write_text("the one before")
    figures.write_text("a file where the folder should be")
    with pytest.raises(UnwritableError, match="figures"):
        reports.write(report, page, figures)
    figures.unlink()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"size\.png"):
        reports.write(report, page, figures)
    assert page.read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["figures", "report.html"]


def test_hard_rows_draw(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "W8A8"
    w8a8.quantize(golden / "source", out)
    report = reports.run(reports.prepare(out, golden / "source"))
    assert len(reports.write(report, tmp_path / "report.html", tmp_path).figures) == 4


def test_the_command_takes_results_from_the_environment(golden: Path, tmp_path: Path) -> None:
    base, quant = results.pair(40)
    environment = {
        "EVAL_BASELINE_JSON": str(results.write(tmp_path / "b.json", results.gsm8k("base", base))),
        "EVAL_QUANT_JSON": str(results.write(tmp_path / "q.json", results.gsm8k("quant", quant))),
    }
    out = shutil.copytree(golden / "quark-0.13", tmp_path / "W8A8")
    said = json.loads(cli("report", out, "--json", env=environment, check=True, timeout=None).stdout)
    assert said["page"] == str(tmp_path / "W8A8-report" / "report.html")
    assert "GSM8K" in said["headline"]
    assert all(Path(path).is_file() for path in [said["page"], *said["figures"]])


def test_what_is_not_w8a8_is_refused(golden: Path) -> None:
    with pytest.raises(UnsupportedSchemeError, match="not quantized"):
        reports.prepare(golden / "source")


def test_results_of_different_questions_do_not_compare(golden: Path, tmp_path: Path) -> None:
    first = results.write(tmp_path / "a.json", results.gsm8k("a", [True, False]))
    second = results.write(tmp_path / "b.json", results.gsm8k("b", [True]))
    with pytest.raises(UsageError, match="not comparable"):
        reports.prepare(golden / "quark-0.13", baseline=first, quant=second)


@pytest.mark.parametrize(("lost", "won", "shown"), [(3, 0, "no difference"), (20, 2, "a loss"), (0, 10, "a gain")])
def test_the_headline_claims_what_the_pairs_show(golden: Path, tmp_path: Path, lost: int, won: int, shown: str) -> None:
    base = [True] * 50 + [False] * 50
    quant = [False] * lost + [True] * (50 - lost + won) + [False] * (50 - won)
    first = results.write(tmp_path / "a.json", results.gsm8k("a", base))
    second = results.write(tmp_path / "b.json", results.gsm8k("b", quant))
    report = reports.run(reports.prepare(golden / "quark-0.13", baseline=first, quant=second))
    assert report.headline.endswith(f"GSM8K {50 - lost + won:.1f}% against 50.0%: {shown} shown")


def test_a_missing_package_is_named_with_its_extra(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"w8a8\[publish\]"):
        reports.prepare(golden / "quark-0.13")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report on a small checkpoint, and a folder."""
    folder = Path(__file__).parents[1] / "golden" / "quark-0.13"
    return reports.run(reports.prepare(folder)), tmp_path_factory.mktemp("broken")


WRONG: st.SearchStrategy[Any] = st.sampled_from(
    [None, "x", -1, 0, 2.5, math.nan, math.inf, 1e308, True, [], {}, [None], 10**400, "\ud800"]
)


@given(data=st.data(), wrong=WRONG)
def test_a_broken_result_is_refused_or_drawn(plain: tuple[Report, Path], data: st.DataObject, wrong: Any) -> None:
    report, folder = plain
    kind = data.draw(st.sampled_from(["kld", "gsm8k"]))
    result = results.kld() if kind == "kld" else results.gsm8k("model", [True, False])
    where: Any = result
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if not where[key] or not isinstance(where[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        where = where[key]
    where[key] = wrong
    path = results.write(folder / "result.json", result)
    try:
        found = replace(report, kld=read_kld(path)) if kind == "kld" else replace(report, quant=read_gsm8k(path))
    except InvalidResultError:
        return
    html = render(found)
    assert len(html) > 10_000
    assert re.search(r">\s*-?(nan|inf)\b", html) is None


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.5.self_attn.k_proj.weight", Place("model.layers", 5, "self_attn.k_proj")),
        ("model.layers.5.mlp.experts.17.down_proj.weight", Place("model.layers", 5, "mlp.experts.*.down_proj")),
        ("model.vision_tower.layers.0.fc1.weight", Place("model.vision_tower.layers", 0, "fc1")),
        ("lm_head.weight", Place("", 0, "lm_head")),
        ("0.weight", Place("", 0, "0")),
    ],
)
def test_a_tensor_has_its_place_by_its_name(name: str, where: Place) -> None:
    assert place(name) == where


def test_projections_are_abbreviated_only_where_that_is_clear() -> None:
    names = ("attn.q_proj", "mlp.down_proj", "mlp.experts.*.down_proj")
    assert [short(name, names) for name in names] == ["q", "mlp.down_proj", "mlp.experts.*.down_proj"]


def test_numbers_are_written_as_people_write_them() -> None:
    values = (0.0286, 1e-5, 2.51e-5, 14.21, 1319.0, 0.0)
    assert [number(v) for v in values] == ["0.0286", "10⁻⁵", "2.51·10⁻⁵", "14.2", "1,319", "0"]
