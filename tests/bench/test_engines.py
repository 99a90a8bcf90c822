"""`w8a8 bench engines`: turns, table and drivers, with engines that are made up. No timing is asserted."""

import json
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from w8a8.bench.drivers import _MAIN, LLAMA_CPP, TORCHAO, driven
from w8a8.bench.engines import EnginesResult, race, show, warm_up
from w8a8.errors import EngineError, W8A8Error


class Steady:
    """Reads a character in a millisecond, and decodes a token for each request in `step` seconds."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.asked: list[tuple[str, ...]] = []

    def ask(self, prompts: Sequence[str], tokens: int) -> Mapping[str, Any]:
        self.asked.append(tuple(prompts))
        read = sum(map(len, prompts))
        seconds = read / 1000 + tokens * self.step
        return {"seconds": seconds, "prompt_tokens": read, "completion_tokens": tokens * len(prompts)}


@pytest.fixture
def result() -> EnginesResult:
    engines = {"ours": Steady(0.25), "theirs": Steady(0.5)}
    return EnginesResult("m.gguf", 2, race(engines, runs=3, requests=(1, 4)), {"other": "no room for [torch]"})


def test_decoding_is_timed_without_the_prompts(result: EnginesResult) -> None:
    ours, theirs = result.rows
    for number in (1, 4):
        assert ours.decode[number] == pytest.approx([4 * number] * 3)
        assert theirs.decode[number] == pytest.approx([2 * number] * 3)
        assert all(speed < 1000 for speed in ours.prompt[number])
    values = json.loads(json.dumps(result.to_dict()))
    assert values["rows"][0]["decode_median"] == {"1": pytest.approx(4), "4": pytest.approx(16)}


def test_an_engine_that_would_take_too_long_is_refused() -> None:
    warm_up(Steady(0.1), (1, 4))
    with pytest.raises(W8A8Error, match="about 16 minutes"):
        warm_up(Steady(10.0), (1,))


def test_the_first_answers_of_an_engine_do_not_count() -> None:
    class Compiling(Steady):
        def ask(self, prompts: Sequence[str], tokens: int) -> Mapping[str, Any]:
            answer = super().ask(prompts, tokens)
            return {**answer, "seconds": answer["seconds"] + 1000 * (len(self.asked) == 1)}

    warm_up(Compiling(0.1), (1, 4))


def test_no_two_prompts_of_a_run_begin_alike() -> None:
    engine = Steady(0.1)
    race({"ours": engine}, runs=2, requests=(16,))
    assert len(engine.asked) == 6
    for prompts in engine.asked:
        assert len({prompt[:5] for prompt in prompts}) == 16


def test_the_table_has_who_is_left_out_and_why(result: EnginesResult) -> None:
    text = StringIO()
    show(result, Console(file=text, width=160).print)
    header, _, *rows = text.getvalue().splitlines()
    assert header == "m.gguf, 2 threads, medians of 3; tokens per second"
    assert [row.split()[0] for row in rows] == ["ours", "theirs", "other"]
    assert rows[0].split()[-2:] == ["4.0", "16.0"]
    assert rows[2] == "other is left out: no room for [torch]"


def test_a_driver_answers_and_one_that_dies_is_quoted() -> None:
    echo = "main(lambda prompts, tokens: (sum(map(len, prompts)), tokens * len(prompts)))"
    with driven([sys.executable, "-c", _MAIN + echo]) as engine:
        for _ in range(2):
            found = engine.ask(["one", "three"], 7)
            assert (found["prompt_tokens"], found["completion_tokens"]) == (8, 14)
            assert found["seconds"] >= 0
    dies = "raise SystemExit('no such model')"
    with pytest.raises(EngineError, match="no such model"), driven([sys.executable, "-c", _MAIN + dies]):
        pass


@pytest.mark.parametrize("driver", [TORCHAO, LLAMA_CPP])
def test_drivers_are_python(driver: Any) -> None:
    compile(driver.script, driver.key, "exec")
