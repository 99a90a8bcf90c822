"""`w8a8 eval gsm8k` against a server that answers over HTTP, and against a checkpoint that it serves itself."""

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.command import W8A8, cli
from tests.evals.api import KEY, MODEL, answer, running_api, write_data
from w8a8.errors import HubError, InvalidResultError, ServerError, TargetBusyError, UnwritableError, UsageError
from w8a8.evals.gsm8k.asking import Server
from w8a8.evals.gsm8k.journal import open_journal
from w8a8.evals.gsm8k.questions import INSTRUCTION, load
from w8a8.evals.gsm8k.results import read
from w8a8.evals.gsm8k.run import Progress, Result, evaluate
from w8a8.evals.statistics import wilson

QUESTIONS = 20
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", QUESTIONS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "adder.json"


def run(url: str, data: Path, out: Path, *, key: str = KEY, timeout: float = 60, shots: int = 8, **how: Any) -> Result:
    return evaluate(Server(url, key, timeout), load(data, shots=shots, limit=how.pop("limit", None)), out=out, **how)


def command(*arguments: str) -> list[str]:
    return [*W8A8, "eval", "gsm8k", *arguments]


def gsm8k(*arguments: str, check: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run `w8a8 eval gsm8k` to its end, which takes as long as the model does."""
    return cli("eval", "gsm8k", *arguments, env=ENVIRONMENT, check=check, timeout=None)


def outcomes(path: Path) -> Any:
    return json.loads(path.read_text())["outcomes"]


# --- what is asked, and what the result says ----------------------------------------------------------------------


def test_the_first_examples_are_turns_of_a_chat_and_the_question_is_the_last(data: Path, out: Path) -> None:
    with running_api() as api:
        run(api.url, data, out, concurrency=1)
    train = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    first = api.requests[0]
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"] * 8 + ["user"]
    for i, row in enumerate(train[:8]):
        assert first["messages"][2 * i]["content"] == f"{row['question']}\n\n{INSTRUCTION}"
        assert first["messages"][2 * i + 1]["content"] == row["answer"]
    assert first["messages"][-1]["content"].startswith("Box 0: ")
    assert "#### <answer>" in first["messages"][-1]["content"]
    assert (first["model"], first["temperature"], first["max_tokens"]) == (MODEL, 0, 512)
    assert api.asked() == list(range(QUESTIONS))


def test_a_base_model_has_text_to_complete_and_stops_at_the_next_question(data: Path, out: Path) -> None:
    with running_api() as api:
        result = run(api.url, data, out, completions=True, shots=2)
    first = api.requests[0]
    assert "messages" not in first
    assert first["prompt"].count("Question: ") == 3
    assert first["prompt"].endswith("\nAnswer:")
    assert "Question:" in first["stop"]
    assert result.protocol.endpoint == "completions"
    assert result.outcomes[2].reply.text == answer(2)


def test_the_result_counts_what_the_server_answered(data: Path, out: Path) -> None:
    with running_api(replies={3: {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}}) as api:
        run(api.url, data, out)
    found = read(out)
    strict = sum(i % 3 != 0 and i % 2 == 0 for i in range(QUESTIONS))
    flexible = sum(i % 3 != 0 for i in range(QUESTIONS))
    assert (found["strict"]["correct"], found["flexible"]["correct"]) == (strict, flexible)
    assert found["strict"]["accuracy"] == strict / QUESTIONS
    assert found["strict"]["interval"] == list(wilson(strict, QUESTIONS))
    assert (found["cut_off"], found["empty"], found["errors"]) == (1, 1, 0)
    assert found["tokens"] == {
        "prompt": sum(100 + i for i in range(QUESTIONS) if i != 3),
        "completion": sum(i for i in range(QUESTIONS) if i != 3),
    }
    assert (found["model"], found["base_url"], found["questions"]) == (MODEL, api.url, QUESTIONS)
    protocol = found["protocol"]
    assert (protocol["shots"], protocol["endpoint"], protocol["concurrency"]) == (8, "chat", 16)
    assert (protocol["dataset"], protocol["split"], protocol["answer_format"]) == (
        "openai/gsm8k",
        "test",
        "#### <answer>",
    )
    assert found["versions"]["server"] == "tests"
    outcome = found["outcomes"][4]
    assert (outcome["index"], outcome["gold"], outcome["answer"], outcome["strict"]) == (4, "12", answer(4), True)


def test_the_hash_of_the_prompt_changes_with_the_examples_and_the_endpoint_not_with_the_questions(
    data: Path, out: Path, tmp_path: Path
) -> None:
    variants: list[dict[str, Any]] = [{}, {"shots": 7}, {"completions": True}, {"limit": 3}]
    with running_api() as api:
        hashes = [
            run(api.url, data, out.with_name(f"{i}.json"), **how).protocol.prompt_sha256
            for i, how in enumerate(variants)
        ]
    assert len({*hashes[:3]}) == 3
    assert hashes[0] == hashes[3]


def test_outcomes_do_not_depend_on_concurrency(data: Path, tmp_path: Path) -> None:
    with running_api(delay=0.01) as api:
        run(api.url, data, tmp_path / "one.json", concurrency=1)
        assert api.most_under_way == 1
        run(api.url, data, tmp_path / "many.json", concurrency=16)
        assert 1 < api.most_under_way <= 16
    assert outcomes(tmp_path / "one.json") == outcomes(tmp_path / "many.json")


def test_progress_tells_accuracy_and_tokens_so_far(data: Path, out: Path) -> None:
    seen: list[Progress] = []
    with running_api() as api:
        result = run(api.url, data, out, progress=seen.append)
    assert [now.done for now in seen] == list(range(1, QUESTIONS + 1))
    assert (seen[-1].total, seen[-1].right) == (QUESTIONS, sum(o.strict for o in result.outcomes))
    assert seen[-1].tokens == sum(range(QUESTIONS))


# --- failures -----------------------------------------------------------------------------------------------------


def test_busy_failing_and_silent_servers_are_asked_again(data: Path, out: Path) -> None:
    with running_api(failures={1: [429, 429], 2: [500, 503, 502], 3: [0]}) as api:
        result = run(api.url, data, out, timeout=1, limit=6)
    asked = api.asked()
    assert all(asked.count(i) >= tries for i, tries in enumerate([1, 3, 4, 2, 1, 1]))
    assert [o.reply.text for o in result.outcomes] == [answer(i) for i in range(6)]


def test_a_request_that_keeps_failing_is_an_error_and_is_asked_again_the_next_time(data: Path, out: Path) -> None:
    with running_api(failures={4: [400]}, replies={8: {"choices": []}, 10: "text"}) as api:
        run(api.url, data, out)
        found = read(out)
        assert found["errors"] == 3
        wrong = [o for o in found["outcomes"] if o["error"]]
        assert [o["index"] for o in wrong] == [4, 8, 10]
        assert not any(o["strict"] or o["flexible"] for o in wrong)
        assert "no luck with 4" in wrong[0]["error"]
        api.requests.clear()
        api.replies.clear()
        run(api.url, data, out)
    assert sorted(api.asked()) == [4, 8, 10]
    assert read(out)["errors"] == 0
    assert [o["answer"] for o in outcomes(out)] == [answer(i) for i in range(QUESTIONS)]


def test_a_server_that_goes_away_ends_the_run_and_keeps_the_answers(data: Path, out: Path) -> None:
    with running_api() as api:

        def stop_after_five(now: Progress) -> None:
            api.down = now.done >= 5

        with pytest.raises(ServerError, match="the last 8 requests failed"):
            run(api.url, data, out, concurrency=1, progress=stop_after_five)
        assert not out.exists()
        api.down = False
        api.requests.clear()
        run(api.url, data, out)
    assert sorted(api.asked()) == list(range(5, QUESTIONS))


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"key": "wrong"}, "another API key"),
        ({"model": "another"}, "no model another; it lists: org/adder"),
        ({"url": "http://127.0.0.1:1/v1"}, "not reachable"),
    ],
)
def test_a_server_that_would_refuse_all_is_found_before_any_question(
    how: dict[str, str], complaint: str, data: Path, out: Path
) -> None:
    with running_api() as api, pytest.raises(ServerError, match=complaint):
        run(**{"url": api.url, "data": data, "out": out, **how})  # type: ignore[arg-type]
    assert not api.requests
    assert not out.parent.exists()


@pytest.mark.parametrize("models", ["text", [1], {"data": 5}, {"data": [5]}, {"more": []}])
def test_a_list_of_models_that_is_none_is_refused(models: Any, data: Path, out: Path) -> None:
    with running_api(models=models) as api, pytest.raises(ServerError, match="OpenAI-compatible"):
        run(api.url, data, out)


def test_of_several_models_one_must_be_named(data: Path, out: Path) -> None:
    with running_api(models={"data": [{"id": "a"}, {"id": "b"}]}) as api:
        with pytest.raises(ServerError, match="--model names one of those it lists: a, b"):
            run(api.url, data, out)
        assert run(api.url, data, out, model="b").model == "b"


@pytest.mark.parametrize(
    "reply", [[], "text", {"choices": 5}, {"choices": [5]}, {"choices": [{"message": {"content": [1]}}]}]
)
def test_an_answer_that_is_none_is_an_error_of_that_question(reply: Any, data: Path, out: Path) -> None:
    with running_api(replies={2: reply}) as api:
        result = run(api.url, data, out)
    assert [o.index for o in result.outcomes if o.reply.error] == [2]


def test_a_server_without_a_chat_template_is_named_as_such(data: Path, out: Path) -> None:
    refusing: dict[str, Any] = {"failures": {0: [400]}, "refusal": "the model has no chat template"}
    with running_api(**refusing) as api, pytest.raises(ServerError, match="--completions"):
        run(api.url, data, out)


# --- going on -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("line", ['{"index": 99}', '{"index": 0, "answer": 5}', "null", "{"])
def test_a_garbled_line_is_named(line: str, data: Path, out: Path) -> None:
    with running_api() as api:
        run(api.url, data, out)
        journal = out.with_suffix(".jsonl")
        journal.write_text(f"{journal.read_text()}{line}\n")
        with pytest.raises(InvalidResultError, match=f"line {QUESTIONS + 2}"):
            run(api.url, data, out)


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


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", ["nothing", "[1]", '{"question": "How many?"}', '{"question": "How many?", "answer": "3"}']
)
def test_a_line_that_is_no_question_is_named(row: str, data: Path) -> None:
    with (data / "test.jsonl").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(UsageError, match=rf"test\.jsonl, line {QUESTIONS + 1}"):
        load(data, shots=8)


def test_folders_without_the_data_and_too_many_shots_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.jsonl"):
        load(tmp_path, shots=8)
    with pytest.raises(UsageError, match="has 9 examples"):
        load(data, shots=10)


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(HubError, match=r"openai/gsm8k: .* --data FOLDER"):
        load(None, shots=8)


# --- the command --------------------------------------------------------------------------------------------------


def test_it_prints_a_table_or_json(data: Path, out: Path) -> None:
    with running_api() as api:
        arguments = ("--base-url", api.url.removesuffix("/v1"), "--data", str(data), "--out", str(out))
        table = gsm8k(*arguments, check=True)
        as_json = gsm8k(*arguments, "--json", check=True)
    assert "30.0%" in table.stdout
    assert str(out) in table.stdout
    assert "GSM8K: 20 of 20 questions, 30.0% right" in table.stderr
    assert json.loads(as_json.stdout) == read(out)


def test_in_a_terminal_it_shows_a_bar_with_the_accuracy(data: Path, out: Path) -> None:
    with running_api(delay=0.05) as api:
        arguments = ("--base-url", api.url, "--data", str(data), "--out", str(out), "--concurrency", "2")
        ours, terminal = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm"}
        with subprocess.Popen(command(*arguments), env=environment, stderr=terminal, stdout=subprocess.DEVNULL):
            os.close(terminal)
            shown = b""
            try:
                while piece := os.read(ours, 65536):
                    shown += piece
            except OSError:  # the other side has closed
                pass
    os.close(ours)
    assert b"% right" in shown
    assert b"tokens/s" in shown
    assert b"20/20" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give --base-url"),
        (("--base-url", "http://localhost:1", "--ckpt", "x"), "give --base-url"),
        (("--base-url", "localhost:1"), "not an address"),
        (("--base-url", "http://localhost:99999"), "not an address"),
        (("--base-url", "http://[::1"), "not an address"),
        (("--base-url", "http://localhost:1", "--api-key", "schlüssel"), "printable ASCII"),
    ],
)
def test_it_needs_one_server(arguments: tuple[str, ...], complaint: str, data: Path) -> None:
    done = gsm8k(*arguments, "--data", str(data))
    assert done.returncode == UsageError.exit_code
    assert complaint in done.stderr


def test_a_checkpoint_is_served_for_as_long_as_it_takes(gemma4_w8a8: Path, data: Path, out: Path) -> None:
    arguments = ("--ckpt", str(gemma4_w8a8), "--engine", "transformers", "--data", str(data), "--out", str(out))
    how = ("--limit", "3", "--shots", "2", "--max-tokens", "8", "--json")
    done = gsm8k(*arguments, *how)
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert found["model"] == str(gemma4_w8a8)
    assert found["versions"]["server"] == "w8a8"
    assert [o["error"] for o in found["outcomes"]] == [None] * 3
    assert 0 < found["tokens"]["completion"] <= 3 * 8
    with pytest.raises(URLError, match="refused"):
        urlopen(f"{found['base_url']}/models")


def test_a_checkpoint_without_a_chat_template_is_not_chatted_with(llama: Path, data: Path) -> None:
    (llama / "tokenizer_config.json").write_text("{}")
    arguments = ("--ckpt", str(llama), "--data", str(data))
    done = gsm8k(*arguments)
    assert done.returncode == UsageError.exit_code
    assert "--completions" in done.stderr


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
