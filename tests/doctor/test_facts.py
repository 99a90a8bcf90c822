"""How `w8a8 doctor` looks at a machine: at this one, and at one where much is missing or broken."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.command import cli
from w8a8.doctor import facts

SECTIONS = {"facts", "has", "uses", "faster"}


def broken(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which no other program is found, and importing any of `names` fails."""
    for name in names:
        (folder / f"{name}.py").write_text("raise OSError('lib is broken')\n")
    return {"PATH": "", "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}


def test_it_never_fails_because_something_is_broken(tmp_path: Path) -> None:
    done = cli("doctor", "--json", env=broken(tmp_path, "torch"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == SECTIONS
    assert found["has"]["torch"].endswith("does not import: OSError: lib is broken.")
    assert found["facts"]["read"] > 1e8
    assert found["facts"]["vllm"] is None


def test_a_person_reads_three_short_sections(tmp_path: Path) -> None:
    done = cli("doctor", env={"COLUMNS": "200", **broken(tmp_path, "torch")})
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "This machine",
        "What commands use",
        "To be faster",
    ]


def test_what_an_extra_asks_for_is_read_from_the_packages_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = [
        "numpy>=2.0",
        "torch>=2.8; extra == 'serve'",
        "openai>=2; extra == 'serve'",
        "w8a8[serve]; extra == 'eval'",
        "datasets>=4; extra == 'eval'",
        "s3fs>=2025.3; extra == 's3'",
        "jinja2; extra == 'publish'",
    ]
    here = {"torch": "2.13.0+cpu", "openai": "1.9", "datasets": "4.1"}
    monkeypatch.setattr(facts, "requires", lambda _: stated)
    monkeypatch.setattr(facts, "_version", here.get)
    unmet = facts.unmet()
    assert unmet["serve"] == ("openai>=2",)
    assert unmet["eval"] == ("openai>=2",)
    assert unmet["s3"] == ("s3fs>=2025.3",)
    assert unmet["publish"] == ("jinja2",)
    assert unmet["ray"] == ()


def test_a_torch_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(facts, "TORCH_SECONDS", 1)
    monkeypatch.setattr(facts, "_version", {"torch": "2.13.0"}.get)
    found = facts._torch()
    assert found is not None
    assert found.problem == "does not import within 1 s"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_read_at_some_speed_by_every_thread() -> None:
    assert facts.read_speed(2, 1 << 20, seconds=0) > 1e6
