"""What a person adds to the card stays."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.publish.card.reading import metadata
from w8a8.errors import TargetExistsError, UsageError
from w8a8.publish.card.write import make, write
from w8a8.publish.results import Results


def test_text_between_the_marked_lines_stays(out: Path, files: Results) -> None:
    write(make(out))
    readme = out / "README.md"
    text = readme.read_text()
    places = re.findall(r"<!-- yours: begin (\w+) -->", text)
    assert len(places) > 3
    for place in places:
        begin = f"<!-- yours: begin {place} -->\n"
        text = text.replace(begin, f"{begin}## Mine: {place} | {{{{ x }}}} <b>\n\n```\ncode\n```\n")
    readme.write_text(text)

    write(make(out, results=files))
    again = readme.read_text()
    for place in places:
        mine = f"## Mine: {place} | {{{{ x }}}} <b>\n\n```\ncode\n```\n"
        assert f"<!-- yours: begin {place} -->\n{mine}<!-- yours: end {place} -->" in again
    assert "66.67%" in again


def test_written_again_it_is_the_same(out: Path, files: Results) -> None:
    write(make(out, results=files))
    first = (out / "README.md").read_bytes()
    write(make(out, results=files))
    assert (out / "README.md").read_bytes() == first
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_metadata_a_person_added_stay(out: Path, files: Results) -> None:
    write(make(out, results=files))
    readme = out / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: mit\nlanguage:\n- en\n", 1))
    write(make(out))
    data = metadata(readme.read_text())
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert "model-index" not in data  # what is no longer measured is no longer claimed


ADDED = """\
# what YAML 1.1 takes for booleans, dates and numbers
language:
- no
- en   # and a comment
extra: [on, off, 2024-01-01, 1e5, 0x10, 1_000, 12:30:45, .inf, ~, y]
date: 2024-01-01
thumbnail: "yes"
name: 'Ünïcode – ☃'
widget:
  - text: |
      two
      lines: yes

    "quoted key": &anchor {a: 0o7}
again: *anchor
"key with: colon": null
empty:
"""


@pytest.mark.parametrize("added", [ADDED, ADDED.replace("\n", "\r\n")], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_metadata_a_person_added_stay_byte_for_byte(out: Path, added: str, mark: bytes) -> None:
    write(make(out))
    readme = out / "README.md"
    before = readme.read_bytes()
    readme.write_bytes(mark + before.replace(b"---\n", b"---\n" + added.encode(), 1))
    write(make(out))
    assert readme.read_bytes() == before.replace(b"---\n", b"---\n" + added.encode(), 1)
    write(make(out))
    assert readme.read_bytes() == before.replace(b"---\n", b"---\n" + added.encode(), 1)


def test_metadata_in_braces_stay_too(out: Path) -> None:
    write(make(out))
    readme = out / "README.md"
    text = readme.read_text()
    body = text.partition("\n---\n")[2]
    readme.write_text(f"---\n{{language: [no, 'en'], tags: [x], license: 0bsd}}\n---\n{body}")
    write(make(out))
    assert readme.read_text().startswith("---\nlanguage: [no, 'en']\nlicense: 0bsd\n")
    assert metadata(readme.read_text())["tags"] == metadata(text)["tags"]


@pytest.mark.parametrize(
    "block",
    [
        "- a list",
        "just text",
        "a: [",
        "tags: &mine [x]\nother: *mine",
        "a: " + "[" * 2000,
        "a: " + "x" * 3_000_000,
    ],
    ids=["list", "text", "open", "alias", "deep", "long"],
)
def test_metadata_that_cannot_be_kept_are_an_error_and_lose_nothing(out: Path, block: str) -> None:
    write(make(out))
    readme = out / "README.md"
    broken = f"---\n{block}\n---\n{readme.read_text().partition(chr(10) + '---' + chr(10))[2]}"
    readme.write_text(broken)
    with pytest.raises(UsageError, match="metadata"):
        make(out)
    assert readme.read_text() == broken


def test_metadata_whose_aliases_grow_without_end_are_kept(out: Path) -> None:
    write(make(out))
    readme = out / "README.md"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    readme.write_text(readme.read_text().replace("---\n", f"---\n{bomb}self: &self [*self]\n", 1))
    write(make(out))
    assert bomb in readme.read_text()


def drop_an_end(text: str) -> str:
    return text.replace("<!-- yours: end accuracy -->\n", "")


def drop_the_last_end(text: str) -> str:
    return text.replace("<!-- yours: end license -->\n", "")


def drop_a_begin(text: str) -> str:
    return text.replace("<!-- yours: begin usage -->\n", "")


def double_a_place(text: str) -> str:
    return text + "<!-- yours: begin usage -->\nx\n<!-- yours: end usage -->\n"


def garble_a_marker(text: str) -> str:
    return text.replace("<!-- yours: end about -->", "<!-- yours: end About -->")


def invent_a_place(text: str) -> str:
    return text + "<!-- yours: begin elsewhere -->\nx\n<!-- yours: end elsewhere -->\n"


@pytest.mark.parametrize(
    "damage", [drop_an_end, drop_the_last_end, drop_a_begin, double_a_place, garble_a_marker, invent_a_place]
)
def test_broken_marks_are_an_error_and_lose_nothing(damage: Callable[[str], str], out: Path) -> None:
    write(make(out))
    readme = out / "README.md"
    broken = damage(readme.read_text())
    readme.write_text(broken)
    with pytest.raises(UsageError, match=r"README\.md"):
        make(out)
    assert readme.read_text() == broken


def test_a_readme_of_someone_else_is_only_moved_aside_when_told(out: Path) -> None:
    (out / "README.md").write_text("# Mine\n")
    card = make(out)
    with pytest.raises(TargetExistsError, match="--overwrite"):
        write(card)
    assert (out / "README.md").read_text() == "# Mine\n"

    write(card, overwrite=True)
    assert (out / "README.before.md").read_text() == "# Mine\n"
    assert (out / "README.md").read_text() == card.text

    (out / "README.md").write_text("# Mine again\n")
    with pytest.raises(TargetExistsError, match=r"README\.before\.md"):
        write(make(out), overwrite=True)
    assert (out / "README.md").read_text() == "# Mine again\n"
    assert (out / "README.before.md").read_text() == "# Mine\n"
