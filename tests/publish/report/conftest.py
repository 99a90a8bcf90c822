"""A report for tests that do not draw one of their own."""

from pathlib import Path

import pytest

from w8a8.publish.report import write as reports
from w8a8.publish.report.facts import Report


@pytest.fixture(scope="package")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report on a small checkpoint, and a folder."""
    folder = Path(__file__).parents[2] / "golden" / "quark-0.13"
    return reports.run(reports.prepare(folder)), tmp_path_factory.mktemp("broken")
