"""The clients that people use against the embedded engine; lm-eval is in tests/engines."""

import itertools
import time
from typing import Any

import httpx2 as httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.serve.embedded.servers import KEY, NAME, message
from tests.servers import Server

pytestmark = pytest.mark.engine

WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}},
}
CALL: Any = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": " w7"}'}}


def tokens(client: openai.OpenAI, messages: Any, **how: Any) -> int:
    """The length of a prompt in tokens."""
    made = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1, **how)
    assert made.usage is not None
    return int(made.usage.prompt_tokens)


def test_openai_keeps_a_history_of_whole_answers(client: openai.OpenAI) -> None:
    messages = message(" w8 w7")
    for turn in range(1, 4):
        reply = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, temperature=0).choices[0]
        assert len((reply.message.content or "").split()) == 4
        messages.append(reply.message.model_dump())
        messages.append({"role": "user", "content": " w6"})
        assert tokens(client, messages) == 3 + 5 * turn + 2 * turn


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None},
        {"annotations": [], "audio": None, "function_call": None, "id": "msg_1"},
        {"tool_calls": None, "reasoning": "w3"},
    ],
)
def test_what_answers_carry_besides_is_ignored_in_a_history(client: openai.OpenAI, more: dict[str, Any]) -> None:
    history = [*message(" w8"), {"role": "assistant", "content": " w1", **more}, *message(" w7")]
    assert tokens(client, history) == 6


@pytest.mark.parametrize(
    "harmless",
    [
        {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "safety_identifier": "x"},
        {"reasoning_effort": "low", "verbosity": "low", "prediction": None, "prompt_cache_key": "x"},
        {
            "n": 1,
            "logprobs": False,
            "top_logprobs": 0,
            "response_format": {"type": "text"},
            "logit_bias": {},
            "presence_penalty": 0.0,
        },
        {"extra_body": {"frobnicate": 1, "functions": None, "modalities": ["text"], "max_length": 10**9}},
        {"stop": [], "extra_body": {"stream_options": {"include_usage": True}}},
        {"parallel_tool_calls": False},
    ],
)
def test_fields_that_change_nothing_are_ignored(client: openai.OpenAI, harmless: dict[str, Any]) -> None:
    assert tokens(client, message(" w8 w7"), **harmless) == 3


def test_a_developer_is_the_system(client: openai.OpenAI) -> None:
    counted = [tokens(client, [{"role": role, "content": " w5"}, *message(" w8")]) for role in ("system", "developer")]
    assert counted == [4, 4]  # the template knows no developer


def test_a_model_is_described_by_its_name_though_it_has_slashes(client: openai.OpenAI, server: Server) -> None:
    assert client.models.retrieve(NAME) == client.models.list().data[0]
    assert httpx.get(f"{server.url}/v1/models/{NAME}").json()["id"] == NAME
    with pytest.raises(openai.NotFoundError, match="other/model does not exist"):
        client.models.retrieve("other/model")


def test_usage_comes_last_in_a_stream_and_only_if_it_is_wanted(client: openai.OpenAI) -> None:
    asked: Any = {"model": NAME, "messages": message(" w8 w7"), "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    *others, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in others)
    assert others[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in others) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in others] == [None] * (len(others) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**asked, stream=True))


def test_tools_reach_the_template_unless_none_is_to_be_chosen(client: openai.OpenAI) -> None:
    assert tokens(client, message(" w8"), tools=[WEATHER]) == 3
    assert tokens(client, message(" w8"), tools=[WEATHER], tool_choice="auto") == 3
    assert tokens(client, message(" w8"), tools=[WEATHER], tool_choice="none") == 2
    assert tokens(client, message(" w8"), tools=[], tool_choice="none") == 2


@pytest.mark.parametrize("arguments", ['{"place": " w7"}', "{}", ""])
def test_a_history_of_calls_is_read(client: openai.OpenAI, arguments: str) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    history = [
        *message(" w8"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": " w6"},
    ]
    assert tokens(client, history, tools=[WEATHER]) == 2 + (3 if "w7" in arguments else 2) + 2 + 1


def test_a_cancelled_stream_makes_room(client: openai.OpenAI) -> None:
    for _ in range(20):  # more than run at a time
        with client.completions.create(model=NAME, prompt=" w1", max_tokens=8000, stream=True) as stream:
            assert len(list(itertools.islice(stream, 2))) == 2
    begun = time.monotonic()
    client.completions.create(model=NAME, prompt=" w1", max_tokens=2)
    assert time.monotonic() - begun < 30


def test_a_template_is_given_what_it_reads(client: openai.OpenAI) -> None:
    def given(**values: Any) -> int:
        return tokens(client, message(" w8"), extra_body={"chat_template_kwargs": values})

    assert [given(), given(enable_thinking=False), given(enable_thinking=True)] == [2, 2, 5]
    assert given(suffix=" w7 w6", enable_thinking=None) == 4


def chatter(server: Server, **how: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr(server.key), model=NAME, temperature=0, max_retries=0, **how
    )


def test_langchain_chats_with_a_history(server: Server) -> None:
    model = chatter(server, max_tokens=4)
    history: list[Any] = [SystemMessage(" w5"), HumanMessage(" w8")]
    first = model.invoke(history)
    history += [first, HumanMessage(" w6"), AIMessage("", tool_calls=[{"name": "weather", "args": {}, "id": "1"}])]
    second = model.bind_tools([WEATHER]).invoke([*history, ToolMessage(" w2", tool_call_id="1")])
    assert isinstance(first, AIMessage)
    assert [made.usage_metadata["input_tokens"] for made in (first, second)] == [4, 4 + 5 + 2 + 2 + 2 + 1]  # type: ignore[index]


def test_langchain_streams_with_usage(server: Server) -> None:
    model = chatter(server, max_tokens=6, stream_usage=True)
    chunks = list(model.stream(" w8"))
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke(" w8").content
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [(usage["input_tokens"], usage["output_tokens"]) for usage in used] == [(2, 6)]


def test_a_wrong_key_is_the_clients_own_error(locked: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key=f"{KEY}x", max_retries=0).models.list()
