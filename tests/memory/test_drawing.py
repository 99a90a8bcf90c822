"""The picture of `w8a8 fit`, on terminals and in pipes."""

import io

import pytest
from rich.console import Console

from tests.memory.reference import gemma4_31b
from w8a8.machine import describe
from w8a8.memory import fit
from w8a8.memory.drawing import draw


def drawn(gpus: str, *, width: int = 80, color: bool = False, encoding: str = "utf-8", **options: int) -> list[str]:
    """The lines of a picture of Gemma 4 31B on `gpus`."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=color, color_system="truecolor" if color else None)
    draw(fit(gemma4_31b(), describe(gpus), **options), console)  # type: ignore[arg-type]
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def bars(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("GPU ")]


def test_there_is_a_bar_for_each_gpu_and_the_answer_below() -> None:
    lines = drawn("4x24GiB:gfx1100")
    assert len(bars(lines)) == 4
    assert lines[-1].startswith("fits: up to 262,144 tokens")
    assert any(line.startswith("██ weights") and "9.6 GB" in line for line in lines)


@pytest.mark.parametrize("gpus", ["24GiB", "4x24GiB", "8x141GiB"])
def test_bars_and_figures_are_80_columns_wide_at_most(gpus: str) -> None:
    lines = drawn(gpus)
    assert max(len(line.rstrip()) for line in lines if line[:1] in "G█▓▒░·") <= 80


def test_a_part_is_as_long_as_its_share() -> None:
    (bar,) = bars(drawn("48GB"))
    cells = bar[7:].rpartition(" of")[0].rstrip("0123456789. ")
    assert cells.count("█") / len(cells) == pytest.approx(33.8 / 48, abs=0.02)
    assert cells.count("·") / len(cells) == pytest.approx(0.1, abs=0.02)


def test_what_is_too_much_stands_behind_the_end_of_the_card() -> None:
    lines = drawn("24GiB")
    (bar,) = bars(lines)
    assert "█┃█" in bar
    assert "41.1 of" in bar
    verdict = next(i for i, line in enumerate(lines) if line.startswith("does not fit: 17."))
    assert all(line.startswith("  - ") for line in lines[verdict + 1 :])


def test_parts_differ_without_color_and_without_unicode() -> None:
    text = "\n".join(drawn("4x24GiB", encoding="ascii"))
    assert "\x1b" not in text
    assert all(mark in bars(text.splitlines())[0] for mark in "#=+.")
    assert "\x1b[" in "\n".join(drawn("4x24GiB", color=True))


def test_a_rack_of_gpus_is_not_drawn_one_by_one() -> None:
    lines = drawn("16x24GiB")
    assert len(bars(lines)) == 8
    assert "... and 8 more like them" in lines
