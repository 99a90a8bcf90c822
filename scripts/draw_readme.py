"""Draw the README's picture, docs/recipes.svg, from results of `w8a8 bench quality` that lie in docs/measured.

    python scripts/draw_readme.py

The output of `w8a8 bench quality ... --json` can be drawn as it is: put it in that file's place.
"""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
MEASURED = DOCS / "measured" / "quality-gemma-3-270m.json"
PICTURE = DOCS / "recipes.svg"

BASELINE = "w8a8 rtn"
ROWS = {
    "w8a8 smooth+gptq, 5% in BF16": "w8a8 smooth+gptq, 5% in BF16",
    "w8a8 smooth+gptq": "w8a8 smooth+gptq",
    "w8a8 smooth": "w8a8 smooth",
    BASELINE: "w8a8 rtn: plain rounding",
    "llm-compressor 0.14.0.1 GPTQ": "llm-compressor, GPTQ",
    "llm-compressor 0.14.0.1 SmoothQuant, mappings by hand": "llm-compressor, SmoothQuant",
    "llm-compressor 0.14.0.1": "llm-compressor",
    "AMD Quark 0.13": "AMD Quark",
}
"""Results shown, top to bottom, and their labels.

Left out is llm-compressor's SmoothQuant with the mappings it infers: it leaves 800 times as much as plain rounding.
"""

KINDS = {"GSM8K": 1.0, "prose": 0.5}
"""Kinds of text, and the opacity of their bars."""

# The picture cannot know which background it is on: these colours read on white and on GitHub's dark one alike.
TEXT, LINE, OURS, OTHERS = "#747d88", "#747d88", "#1f9e89", "#8b93a1"

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 800, 275, 55, 88, 40, 14


def draw(measured: Mapping[str, Any]) -> str:
    """Return the picture as SVG: the KL divergence that each recipe leaves, as a share of plain rounding's."""
    means = {row["name"]: {kind: row["scores"][kind]["mean"] for kind in KINDS} for row in measured["rows"]}
    shares = {name: {kind: means[name][kind] / means[BASELINE][kind] for kind in KINDS} for name in ROWS}
    height = TOP + ROW * len(ROWS)
    per_share = (WIDTH - LEFT - RIGHT) / max(max(found.values()) for found in shares.values())
    said = [f"{ROWS[n]}: {', '.join(f'{k} {share:.0%}' for k, share in found.items())}" for n, found in shares.items()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>KL divergence from BF16 that each recipe leaves, as a share of what plain rounding leaves</title>",
            f"<desc>{escape('; '.join(said))}</desc>",
            "<style>text { font: 14px system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; "
            f"fill: {TEXT} }} .title {{ font-size: 18px }} .title, .ours {{ font-weight: 600 }} "
            ".small { font-size: 12px } .right { text-anchor: end } .middle { text-anchor: middle }</style>",
            *_head(measured["model"]),
            *_axis(per_share, height),
            *(line for i, name in enumerate(ROWS) for line in _row(TOP + ROW * i, name, shares[name], per_share)),
            "</svg>\n",
        ]
    )


def _head(model: str) -> Iterator[str]:
    yield '<text class="title" x="0" y="20">KL divergence from BF16 that each recipe leaves</text>'
    yield f'<text x="0" y="43">{escape(model)} in INT8 W8A8, plain rounding = 100%; shorter is better</text>'
    for i, (kind, opacity) in enumerate(KINDS.items()):
        x = WIDTH - 150 + 85 * i
        yield f'<rect x="{x}" y="9" width="12" height="12" rx="2" fill="{OURS}" opacity="{opacity}"/>'
        yield f'<text x="{x + 18}" y="20">{kind}</text>'


def _axis(per_share: float, height: int) -> Iterator[str]:
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = LEFT + share * per_share
        yield f'<path d="M{x:.1f} {TOP - 8}V{height}" stroke="{LINE}" opacity="{0.3 if share else 0.8}"/>'
        yield f'<text class="small middle" x="{x:.1f}" y="{TOP - 14}">{share:.0%}</text>'


def _row(y: float, name: str, shares: Mapping[str, float], per_share: float) -> Iterator[str]:
    ours = name.startswith("w8a8")
    colour = OURS if ours and name != BASELINE else OTHERS
    bold = "ours " if ours else ""
    yield f'<text class="{bold}right" x="{LEFT - 10}" y="{y + BAR + 5}">{escape(ROWS[name])}</text>'
    for i, (kind, opacity) in enumerate(KINDS.items()):
        top, width = y + i * (BAR + 1), shares[kind] * per_share
        box = f'x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2"'
        yield f'<rect {box} fill="{colour}" opacity="{opacity}"/>'
        yield f'<text class="{bold}small" x="{LEFT + width + 6:.1f}" y="{top + 11}">{shares[kind]:.0%}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(json.loads(MEASURED.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PICTURE)
