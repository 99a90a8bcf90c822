"""An evaluation against a server that answers over HTTP: what is asked, the result, and failures."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evals.api import MODEL, answer, running_api
from tests.evals.gsm8k.runs import QUESTIONS, outcomes, run
from w8a8.errors import ServerError
from w8a8.evals.gsm8k.questions import INSTRUCTION
from w8a8.evals.gsm8k.results import read
from w8a8.evals.gsm8k.run import Progress
from w8a8.evals.statistics import wilson

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


def test_several_servers_share_the_questions(data: Path, tmp_path: Path) -> None:
    with running_api(delay=0.01) as first, running_api(delay=0.01) as second:
        run(first.url, data, tmp_path / "both.json", concurrency=2, others=(second.url,))
        assert first.asked()
        assert second.asked()
        assert sorted([*first.asked(), *second.asked()]) == list(range(QUESTIONS))
        assert max(first.most_under_way, second.most_under_way) == 2
        run(first.url, data, tmp_path / "one.json")
        assert f"{first.url}, {second.url}" in (tmp_path / "both.json").read_text()
    assert outcomes(tmp_path / "both.json") == outcomes(tmp_path / "one.json")


def test_a_server_that_has_another_model_ends_the_run_before_any_question(data: Path, out: Path) -> None:
    with running_api() as first, running_api(models={"data": [{"id": "org/other"}]}) as second:
        with pytest.raises(ServerError, match=rf"{second.url}: it has no model {MODEL}"):
            run(first.url, data, out, others=(second.url,))
        assert not first.asked()


def test_progress_tells_accuracy_and_tokens_so_far(data: Path, out: Path) -> None:
    seen: list[Progress] = []
    with running_api() as api:
        result = run(api.url, data, out, progress=seen.append)
    assert [now.done for now in seen] == list(range(1, QUESTIONS + 1))
    assert (seen[-1].total, seen[-1].right) == (QUESTIONS, sum(o.marks.strict for o in result.outcomes))
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
