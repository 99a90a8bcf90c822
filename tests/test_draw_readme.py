"""The README's picture is drawn from the numbers that the documentation shows, and is no older than they are."""

import json
import re
from xml.etree import ElementTree

import draw_readme

MEASURED = json.loads(draw_readme.MEASURED.read_text())


def test_the_picture_is_what_the_script_draws() -> None:
    assert draw_readme.PICTURE.read_text() == draw_readme.draw(MEASURED)


def test_its_numbers_are_those_of_the_documentation() -> None:
    page = (draw_readme.DOCS / "recipes.md").read_text()
    assert MEASURED["command"] in page
    for kind, tokens in MEASURED["tokens"].items():
        _, _, table = page.partition(f"    {kind}, {tokens:,} tokens ")
        lines = table.partition("\n\n")[0].splitlines()[1:]
        assert len(lines) == len(MEASURED["rows"])
        for line, row in zip(lines, MEASURED["rows"], strict=True):
            score = row["scores"][kind]
            said = (
                f"    {re.escape(row['name'])} +{score['mean']:.5f} +[0-9.]+ +{score['top1']:.1%} +{row['megabytes']}"
            )
            assert re.fullmatch(said, line)


def test_it_shows_every_share_needs_nothing_and_is_small() -> None:
    picture = draw_readme.PICTURE.read_text()
    root = ElementTree.fromstring(picture)
    said = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert set(draw_readme.ROWS.values()) <= set(said)
    bars = root.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(bars) == len(draw_readme.KINDS) * (1 + len(draw_readme.ROWS))
    assert all(float(bar.attrib["x"]) + float(bar.attrib["width"]) <= draw_readme.WIDTH for bar in bars)
    assert len(picture) < 15_000
    assert not re.search(r"(href|url\(|@import|<script|<image)", picture)
