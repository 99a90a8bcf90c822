"""What the report says: its headline, names, numbers, and results that are broken."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.publish import results
from w8a8.errors import InvalidResultError
from w8a8.publish.report import write as reports
from w8a8.publish.report.data import Place, place, short
from w8a8.publish.report.facts import Report
from w8a8.publish.report.page import render
from w8a8.publish.report.style import number
from w8a8.publish.results import Results, read_gsm8k, read_kld


@pytest.mark.parametrize(("lost", "won", "shown"), [(3, 0, "no difference"), (20, 2, "a loss"), (0, 10, "a gain")])
def test_the_headline_claims_what_the_pairs_show(golden: Path, tmp_path: Path, lost: int, won: int, shown: str) -> None:
    base = [True] * 50 + [False] * 50
    quant = [False] * lost + [True] * (50 - lost + won) + [False] * (50 - won)
    first = results.write(tmp_path / "a.json", results.gsm8k("a", base))
    second = results.write(tmp_path / "b.json", results.gsm8k("b", quant))
    report = reports.run(reports.prepare(golden / "quark-0.13", baseline=first, quant=second))
    assert report.headline.endswith(f"GSM8K {50 - lost + won:.1f}% against 50.0%: {shown} shown")


WRONG: st.SearchStrategy[Any] = st.sampled_from(
    [None, "x", -1, 0, 2.5, math.nan, math.inf, 1e308, True, [], {}, [None], 10**400, "\ud800"]
)


@given(data=st.data(), wrong=WRONG)
def test_a_broken_result_is_refused_or_drawn(plain: tuple[Report, Path], data: st.DataObject, wrong: Any) -> None:
    report, folder = plain
    kind = data.draw(st.sampled_from(["kld", "gsm8k", "lm"]))
    right = [True, False]
    result = {"kld": results.kld(), "gsm8k": results.gsm8k("model", right), "lm": results.lm("model", right)}[kind]
    where: Any = result
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if not where[key] or not isinstance(where[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        where = where[key]
    where[key] = wrong
    path = results.write(folder / "result.json", result)
    try:
        found = {
            "kld": lambda: replace(report, kld=read_kld(path)),
            "gsm8k": lambda: replace(report, quant=read_gsm8k(path)),
            "lm": lambda: replace(report, tasks=Results(lm_quant=path).read().tasks),
        }[kind]()
    except InvalidResultError:
        return
    html = render(found)
    assert len(html) > 10_000
    assert re.search(r">\s*-?(nan|inf)\b", html) is None


def test_other_tasks_stand_in_a_table(plain: tuple[Report, Path]) -> None:
    report, folder = plain
    hostile = results.lm("<b>", [True, False, True])
    hostile["rows"][0]["name"] = "<script>"
    paths = [results.write(folder / f"{i}.json", hostile) for i in range(2)]
    html = render(replace(report, tasks=Results(lm_baseline=paths[0], lm_quant=paths[1]).read().tasks))
    section = html.split('<section id="tasks">')[1].split("</section>")[0]
    assert "&lt;script&gt;" in section
    assert "<script>" not in html
    assert section.count("0.6667 <small>± 0.0123</small>") == 4
    assert "No difference shown in any of 2 tasks." in section
    assert 'id="tasks"' not in render(report)


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
