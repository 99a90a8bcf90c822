"""A run that ended early goes on where it was, from its journal."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.evals.api import running_api
from tests.evals.gsm8k.runs import ENVIRONMENT, QUESTIONS, command, gsm8k, outcomes, run, wait_for
from w8a8.errors import InvalidResultError, TargetBusyError, UnwritableError, UsageError
from w8a8.evals.gsm8k.journal import open_journal

pytestmark = pytest.mark.slow


def test_a_killed_run_goes_on_where_it_was(data: Path, out: Path, tmp_path: Path) -> None:
    with running_api(delay=0.3) as api:
        arguments = ("--base-url", api.url, "--data", str(data), "--out", str(out), "--concurrency", "2", "--quiet")
        process = subprocess.Popen(command(*arguments), env=ENVIRONMENT)
        wait_for(lambda: len(api.requests) >= 6)
        process.kill()
        process.wait()
        journal = out.with_suffix(".jsonl")
        kept = {line["index"] for line in map(json.loads, journal.read_text().splitlines()[1:])}
        assert len(kept) >= 4
        with journal.open("a") as file:
            file.write('{"index": 19, "answ')  # as a kill in the middle of a line leaves it
        api.delay = 0
        api.requests.clear()
        done = gsm8k(*arguments, check=True)
        assert sorted(api.asked()) == sorted(set(range(QUESTIONS)) - kept)
        run(api.url, data, tmp_path / "whole.json")
    assert "strict" in done.stdout
    assert outcomes(out) == outcomes(tmp_path / "whole.json")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted(line["index"] for line in lines[1:]) == list(range(QUESTIONS))


def test_a_journal_without_texts_is_gone_on_with_to_the_same_scores(data: Path, out: Path, tmp_path: Path) -> None:
    with running_api() as api:
        whole = run(api.url, data, tmp_path / "whole.json")
        run(api.url, data, out, texts=False)
        journal = out.with_suffix(".jsonl")
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([*lines[:9], ""]))
        kept = {json.loads(line)["index"] for line in lines[1:9]}
        api.requests.clear()
        found = run(api.url, data, out, texts=False)
        assert sorted(api.asked()) == sorted(set(range(QUESTIONS)) - kept)
    assert not [file for file in (out, journal) if "pears" in file.read_text()]
    same = ("strict", "flexible", "cut_off", "empty", "errors", "tokens", "protocol")
    assert [found.to_dict()[name] for name in same] == [whole.to_dict()[name] for name in same]
    assert [(o["index"], o["gold"], o["strict"]) for o in outcomes(out)] == [
        (o["index"], o["gold"], o["strict"]) for o in outcomes(tmp_path / "whole.json")
    ]


def test_answers_whose_texts_were_left_out_stay_scored_in_a_result_with_texts(data: Path, out: Path) -> None:
    with running_api() as api:
        before = run(api.url, data, out, texts=False)
        after = run(api.url, data, out)
    assert {outcome["answer"] for outcome in outcomes(out)} == {None}
    assert after.to_dict()["strict"] == before.to_dict()["strict"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(number: signal.Signals, code: int, data: Path, out: Path) -> None:
    with running_api(delay=0.4) as api:
        arguments = ("--base-url", api.url, "--data", str(data), "--out", str(out), "--concurrency", "2")
        process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(api.requests) >= 5)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == code
        assert said.strip().splitlines()[-1] == (
            "w8a8: interrupted; the answers so far are kept, and the same command goes on from there"
        )
        assert "Traceback" not in said
        assert not out.exists()
        kept = len(out.with_suffix(".jsonl").read_text().splitlines()) - 1
        assert kept >= 2
        api.delay = 0
        api.requests.clear()
        run(api.url, data, out)
    assert len(api.requests) == QUESTIONS - kept


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"max_tokens": 256}, "max_tokens was 512, not 256"),
        ({"shots": 4}, "shots was 8, not 4"),
        ({"limit": 10}, "questions was 20, not 10"),
        ({"completions": True}, "endpoint was chat, not completions"),
        ({"temperature": 0.5}, "temperature was 0, not 0.5"),
    ],
)
def test_answers_to_another_protocol_are_not_mixed_in_unless_begun_anew(
    how: dict[str, Any], complaint: str, data: Path, out: Path
) -> None:
    with running_api() as api:
        run(api.url, data, out)
        with pytest.raises(UsageError, match=complaint):
            run(api.url, data, out, **how)
        api.requests.clear()
        run(api.url, data, out, restart=True, **how)
        assert len(api.requests) == how.get("limit", QUESTIONS)


def test_another_concurrency_may_go_on_and_finished_runs_ask_nothing(data: Path, out: Path) -> None:
    notices: list[str] = []
    with running_api() as api:
        run(api.url, data, out, concurrency=16)
        before = outcomes(out)
        api.requests.clear()
        run(api.url, data, out, concurrency=2, notice=notices.append)
        assert not api.requests
    assert outcomes(out) == before
    assert "20 of 20 are answered already; --restart" in notices[0]


@pytest.mark.parametrize(
    "content", ["no JSON\n", "[]\n", "{}\n", '{"kind": "other", "started": "now"}\n', "[" * 99999 + "\n"]
)
def test_a_file_that_is_no_journal_is_left_alone(content: str, data: Path, out: Path) -> None:
    journal = out.with_suffix(".jsonl")
    journal.parent.mkdir()
    journal.write_text(content)
    with running_api() as api, pytest.raises(InvalidResultError, match=r"adder\.jsonl"):
        run(api.url, data, out)
    assert journal.read_text() == content


UNKNOWN = (
    '{"index": 0, "answer": null, "finish_reason": null, "prompt_tokens": 1, "completion_tokens": 1, "error": null, '
    '"seconds": 1}'
)
"""An outcome with neither the text of the answer nor its marks."""
LINES = ['{"index": 99}', UNKNOWN, '{"index": 0, "answer": 5}', "null", "{", "[1]", "[" * 99999, '"\\ud800"']


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:9])
def test_a_garbled_line_is_named_and_costs_no_other_answer(line: str, data: Path, out: Path) -> None:
    notices: list[str] = []
    with running_api() as api:
        run(api.url, data, out)
        before = outcomes(out)
        journal = out.with_suffix(".jsonl")
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([*lines[:-1], line, ""]))
        api.requests.clear()
        run(api.url, data, out, notice=notices.append)
        assert api.asked() == [json.loads(lines[-1])["index"]]
    assert f"line {QUESTIONS + 1}" in notices[0]
    assert outcomes(out) == before


def test_two_runs_do_not_write_one_file(data: Path, out: Path) -> None:
    with (
        running_api() as api,
        open_journal(out.with_suffix(".jsonl"), asking={}, started="now", questions=1, restart=False),
        pytest.raises(TargetBusyError),
    ):
        run(api.url, data, out)


def test_a_place_that_cannot_be_written_is_an_error(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with running_api() as api:
        with pytest.raises(UnwritableError, match="file"):
            run(api.url, data, tmp_path / "file" / "x.json")
        with pytest.raises(UsageError, match=r"ends in \.json"):
            run(api.url, data, tmp_path / "x.jsonl")
