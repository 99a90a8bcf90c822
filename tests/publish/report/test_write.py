"""What a report is made from, what it refuses, and where it is written."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import w8a8
from tests.command import cli
from tests.publish import results
from w8a8.errors import DiskFullError, MissingExtraError, UnsupportedSchemeError, UnwritableError, UsageError
from w8a8.publish.report import write as reports
from w8a8.publish.report.facts import Report

pytestmark = pytest.mark.slow


def test_the_source_that_lies_beside_is_found_and_no_other(gemma4: Path, gemma4_w8a8: Path, tmp_path: Path) -> None:
    assert reports.prepare(gemma4_w8a8).verification is not None
    moved = shutil.copytree(gemma4_w8a8, tmp_path / "moved" / "W8A8")
    assert reports.prepare(moved).verification is None
    shutil.copytree(gemma4, tmp_path / gemma4.name)
    provenance = json.loads((moved / "w8a8.json").read_text())
    for name in ("..", f"../{gemma4.name}", str(gemma4), "", "no/such-repository"):
        (moved / "w8a8.json").write_text(json.dumps(provenance | {"source": {"name": name}}))
        assert reports.prepare(moved).verification is None


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


def test_flips_of_results_without_texts_are_counted(golden: Path, tmp_path: Path) -> None:
    base, quant = [True] * 9 + [False], [True] * 6 + [False] * 3 + [True]
    files = []
    for name, right in (("base", base), ("quant", quant)):
        found = results.gsm8k(name, right)
        slim = [{key: o[key] for key in o if key not in {"question", "answer"}} for o in found["outcomes"]]
        files.append(results.write(tmp_path / f"{name}.json", {**found, "outcomes": slim}))
    report = reports.run(reports.prepare(golden / "quark-0.13", baseline=files[0], quant=files[1]))
    page = reports.write(report, tmp_path / "report.html", tmp_path).page.read_text()
    assert "4 answers that flipped" in page
    assert "3 only the original, 1 only the quantized. The results hold no texts" in page
    assert '<details class="flip">' not in page


def test_what_is_not_w8a8_is_refused(golden: Path) -> None:
    with pytest.raises(UnsupportedSchemeError, match="not quantized"):
        reports.prepare(golden / "source")


def test_results_of_different_questions_do_not_compare(golden: Path, tmp_path: Path) -> None:
    first = results.write(tmp_path / "a.json", results.gsm8k("a", [True, False]))
    second = results.write(tmp_path / "b.json", results.gsm8k("b", [True]))
    with pytest.raises(UsageError, match="not comparable"):
        reports.prepare(golden / "quark-0.13", baseline=first, quant=second)


def test_a_missing_package_is_named_with_its_extra(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"w8a8\[publish\]"):
        reports.prepare(golden / "quark-0.13")
