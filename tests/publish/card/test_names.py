"""Names in the card may hold anything, and do nothing."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.publish.card.reading import SECTIONS, details, metadata
from w8a8.publish.card.write import make, write

pytestmark = pytest.mark.slow

HOSTILE = st.one_of(
    st.text(min_size=1, max_size=60),
    st.text(alphabet="|`<>*_[]()\\#~-!&;\n\r {}%\"'$:", min_size=1, max_size=40),
    st.sampled_from(
        [
            "a | b | c",
            "```\n# Owned\n```",
            "<script>alert(1)</script>",
            "<!-- yours: begin about -->",
            "x\n<!-- yours: end about -->\n",
            "](javascript:alert(1))",
            "{{ 7 * 7 }}{% raw %}",
            "---\nlicense: mit\n---",
            "$x$ ~~y~~ **z** __w__",
            "# Owned",
            "- item",
            "+ item",
            "1. one",
            "2) two",
            "===",
            "---",
            "    code",
        ]
    ),
)


@settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(name=" ", architecture="x")
@given(name=HOSTILE, architecture=HOSTILE)
def test_names_are_shown_and_do_nothing_else(out: Path, name: str, architecture: str) -> None:
    from w8a8.terminal.wording import printable

    made, config = json.loads((out / "w8a8.json").read_text()), json.loads((out / "config.json").read_text())
    made["source"]["name"] = name.replace("/", "_").encode(errors="replace").decode()
    config["architectures"] = [architecture.encode(errors="replace").decode()]
    config["quantization_config"]["exclude"] = [made["source"]["name"], config["architectures"][0]]
    before = {path: path.read_bytes() for path in (out / "w8a8.json", out / "config.json")}
    try:
        (out / "w8a8.json").write_text(json.dumps(made))
        (out / "config.json").write_text(json.dumps(config))
        card = make(out)
        text = card.text
        write(card)
        assert make(out).text == text  # its own marks are still whole
    finally:
        for path, content in before.items():
            path.write_bytes(content)
        (out / "README.md").unlink(missing_ok=True)

    assert "license" not in metadata(text)
    found = details(text)
    assert found["Base Model"].strip() == printable(made["source"]["name"]).strip()
    assert found["Architecture"].strip() == printable(config["architectures"][0]).strip()
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    assert [t.tag for t in tokens if t.type == "heading_open"].count("h1") == 1
    assert [t.tag for t in tokens if t.type == "heading_open"].count("h2") == len(SECTIONS)
    assert [t.level for t in tokens if t.type.endswith("_list_open")] == [0, 2]
    html = [t for t in tokens if t.type == "html_block"]
    html += [c for t in tokens for c in t.children or () if c.type == "html_inline"]
    assert all(line.startswith("<!-- ") for t in html for line in t.content.strip().splitlines())
    links = [c.attrs["href"] for t in tokens for c in t.children or () if c.type == "link_open"]
    assert links == []
