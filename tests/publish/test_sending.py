"""`quantize --push`, from one Hub to another over real HTTP: what arrives, what stays, and what goes wrong."""

import json
import shutil
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import _http, _xet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.hub import Hub as Source
from tests.checkpoint.hub import local_hub
from tests.checkpoints import LLAMA, folder_bytes, llama_tensors, write_checkpoint
from tests.command import cli
from tests.execute.runs import staging_of
from tests.publish.hub import COMMIT, Hub, Repository, ask, receiving_hub
from w8a8 import quantize
from w8a8.errors import HubError, UsageError, W8A8Error
from w8a8.execute.staging import Staging
from w8a8.execute.status import status
from w8a8.publish import sending
from w8a8.publish.card import write as card
from w8a8.publish.card.text import README, is_ours
from w8a8.publish.sending import Upload

SHARDS = 4
REPO = "me/llama-W8A8"
CONFIG = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
CARD = b"---\nlicense: apache-2.0\n---\n# Llama\n"
Files = Mapping[str, bytes]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("source") / "llama", llama_tensors(), config=CONFIG, shards=SHARDS
    )
    (folder / "tokenizer.json").write_text("{}")
    return {**folder_bytes(folder), README: CARD}


@pytest.fixture
def source(llama: Files) -> Iterator[Source]:
    with local_hub({"org/llama": llama}) as hub:
        yield hub


@pytest.fixture
def waits() -> list[float]:
    """The seconds that were waited before something was tried again."""
    return []


@pytest.fixture
def hub(source: Source, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that this process knows, with the Llama; whatever waits for it does not wait."""
    with receiving_hub() as hub:
        hub.elsewhere = source.url
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
        monkeypatch.setattr(sending, "wait", lambda seconds, _stopped: waits.append(seconds))
        ask(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def whole(hub: Hub, tmp_path: Path) -> Files:
    """The result, made here."""
    return folder_bytes(quantize("org/llama", tmp_path / "whole").out)


def push(out: str | Path = "llama-W8A8", *, departs: bool = True, **options: Any) -> Upload:
    """What `w8a8 quantize org/llama --push REPO` does."""
    upload = Upload.open(REPO, departs=departs, **options)
    quantize("org/llama", out, delivery=upload, workers=1)
    return upload


def shown(hub: Hub) -> Files:
    """What the repository shows, without its card."""
    return {name: data for name, data in hub.repositories[REPO].files.items() if name != README}


def test_from_hub_to_hub_the_same_result_arrives_and_nothing_is_left(hub: Hub, whole: Files, tmp_path: Path) -> None:
    done = push().done
    assert done is not None
    assert (done.url, done.commit, done.private) == (f"{hub.url}/{REPO}", COMMIT, True)
    assert shown(hub) == whole
    assert set(done.files) == {*hub.repositories[REPO].files}
    assert is_ours(hub.repositories[REPO].files[README].decode())
    assert "license: apache-2.0" in hub.repositories[REPO].files[README].decode()
    assert len(hub.repositories[REPO].messages) == 1
    assert {hub.received[oid] for oid in hub.objects} == {1}
    assert {entry.name for entry in tmp_path.iterdir()} <= {"whole", "cache"}


def test_with_out_the_result_stays_here_too(hub: Hub, whole: Files, tmp_path: Path) -> None:
    push(tmp_path / "out", departs=False)
    assert folder_bytes(tmp_path / "out") == hub.repositories[REPO].files
    assert shown(hub) == whole


def test_of_what_the_repository_shows_files_of_these_names_are_replaced(hub: Hub, whole: Files) -> None:
    hub.repositories[REPO] = Repository(private=True, files={"notes.txt": b"mine", "config.json": b"{}"})
    push()
    assert shown(hub) == {**whole, "notes.txt": b"mine"}


def test_a_large_shard_goes_in_parts(hub: Hub, whole: Files) -> None:
    hub.part_bytes = 10_000
    push()
    assert shown(hub) == whole
    assert sum("/part/" in request for request in hub.requests) > 2 * SHARDS


def test_a_card_of_what_came_from_the_hub_asks_it_nothing(hub: Hub, tmp_path: Path) -> None:
    out = quantize("org/llama", tmp_path / "out").out
    hub.requests.clear()
    made = card.make(out)
    assert "license: apache-2.0" in made.text
    assert not hub.requests


@pytest.mark.parametrize("out", [["--push", REPO], [f"hf://{REPO}"]])
def test_the_command_says_where_it_went(hub: Hub, llama: Files, tmp_path: Path, out: list[str]) -> None:
    for name, data in llama.items():
        path = tmp_path / "llama" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    run = cli("quantize", "llama", *out, "--json", "--log-json", "--public", env=env)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    [sent] = [line["sent"] for line in map(json.loads, run.stderr.splitlines()) if line["event"] == "end"]
    assert sent["done"] == sent["total"]
    assert (said["url"], said["commit"], said["repo"]) == (f"{hub.url}/{REPO}", COMMIT, REPO)
    assert said["out"] is None
    assert not hub.repositories[REPO].private
    assert not staging_of(tmp_path / "llama-W8A8").exists()
    assert cli("quantize", "llama", "--public", "out").returncode == 2
    run = cli("quantize", "llama", f"hf://{REPO}@dev")
    assert run.returncode == 2
    assert "a result goes to `main`" in run.stderr


def test_the_source_and_what_is_public_are_not_replaced(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the source"):
        Upload.open("Org/llama", source="org/llama")
    hub.repositories[REPO] = Repository(private=False)
    with pytest.raises(UsageError, match="public"):
        push()
    assert not hub.objects
    assert not staging_of(tmp_path / "llama-W8A8").exists()


@pytest.mark.parametrize("there", ["# By hand\n", None])
def test_a_readme_of_a_person_stays_and_what_they_added_to_ours(hub: Hub, there: str | None) -> None:
    if there is None:
        push()
        begin, end = (f"<!-- yours: {what} " for what in ("begin", "end"))
        text = hub.repositories[REPO].files[README].decode()
        place = text.partition(begin)[2].partition(" -->")[0]
        there = text.replace(f"{begin}{place} -->\n", f"{begin}{place} -->\nMine.\n", 1)
        assert end in there
    hub.repositories.setdefault(REPO, Repository(private=True)).files[README] = there.encode()
    push()
    assert hub.repositories[REPO].files[README].decode() == there


FAILURES = [
    (HTTPStatus.UNAUTHORIZED, "/api/whoami-v2", "hf auth login"),
    (HTTPStatus.FORBIDDEN, "/api/repos/create", "may not write"),
    (HTTPStatus.CONFLICT, "/api/repos/create", "same command goes on"),
    (HTTPStatus.FORBIDDEN, "/batch", "may not write"),
    (HTTPStatus.FORBIDDEN, "/lfs/", "may not write"),
    (HTTPStatus.INTERNAL_SERVER_ERROR, "/lfs/", "same command goes on"),
    (HTTPStatus.NOT_FOUND, "/verify/", "same command goes on"),
    ("cut", "/lfs/", "same command goes on"),
    (HTTPStatus.FORBIDDEN, "/commit/", "may not write"),
    (HTTPStatus.CONFLICT, "/commit/", "same command goes on"),
    (HTTPStatus.SERVICE_UNAVAILABLE, "/commit/", "same command goes on"),
]


@pytest.mark.parametrize(("fault", "where", "said"), FAILURES)
def test_a_hub_that_fails_says_what_to_do_and_shows_nothing(
    hub: Hub, whole: Files, fault: HTTPStatus | str, where: str, said: str
) -> None:
    hub.fault = lambda _method, path: fault if where in path else None
    with pytest.raises(HubError, match=said):
        push()
    assert not [files for repository in hub.repositories.values() if (files := repository.files)]
    hub.fault = lambda _method, _path: None
    push()
    assert shown(hub) == whole
    assert set(hub.received.values()) == {1}


@pytest.mark.parametrize("where", ["/lfs/", "/batch", "/commit/"])
def test_a_hub_that_asks_to_wait_is_given_the_time(hub: Hub, whole: Files, waits: list[float], where: str) -> None:
    left, hub.wait = [HTTPStatus.TOO_MANY_REQUESTS] * 2, "100"
    hub.fault = lambda _method, path: left.pop() if left and where in path else None
    push()
    assert shown(hub) == whole
    assert [wait for wait in waits if 99 < wait < 102] == waits != []


def test_nobody_waits_for_a_year(hub: Hub, whole: Files, waits: list[float]) -> None:
    left, hub.wait = [HTTPStatus.TOO_MANY_REQUESTS], "31536000"
    hub.fault = lambda method, _: left.pop() if left and method == "PUT" else None
    push()
    assert shown(hub) == whole
    assert [wait for wait in waits if 299 < wait < 302] == waits != []


def test_what_the_hub_has_lost_is_made_again_and_nothing_else(hub: Hub, whole: Files) -> None:
    interrupted(hub)
    done = status("llama-W8A8").shards_done
    lost = next(oid for oid in hub.objects if hub.objects[oid] in whole.values())
    del hub.objects[lost]
    notices: list[str] = []
    quantize("org/llama", "llama-W8A8", delivery=Upload.open(REPO), notice=notices.append)
    assert notices[-1] == f"resuming: {done - 1} of {SHARDS} shards are done already"
    assert shown(hub) == whole
    assert {oid for oid, count in hub.received.items() if count > 1} == {lost}


def test_what_is_lost_before_the_commit_is_not_committed(hub: Hub, whole: Files) -> None:
    def fault(_method: str, path: str) -> None:
        if path == "/api/validate-yaml":  # it comes with the card, right before the commit
            hub.objects.popitem()

    push_fault, hub.fault = hub.fault, fault
    with pytest.raises(HubError):
        push()
    assert not hub.repositories[REPO].files
    hub.fault = push_fault
    push()
    assert shown(hub) == whole


def test_a_repository_that_keeps_no_large_files_is_refused(hub: Hub) -> None:
    hub.large = ()
    with pytest.raises(HubError, match="gitattributes"):
        push()
    assert not hub.repositories[REPO].files


def test_a_huggingface_hub_whose_private_parts_changed_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_xet, "abort_xet_session")
    with pytest.raises(W8A8Error, match=r"is not known to --push"):
        Upload.open(REPO)
    assert not hub.requests


def test_a_commit_that_was_made_is_not_made_again(hub: Hub, whole: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "drop", ended)
        with pytest.raises(KeyboardInterrupt):
            push()
    assert shown(hub) == whole
    assert staging_of(Path("llama-W8A8").absolute()).exists()
    done = push().done
    assert done is not None
    assert done.commit == COMMIT
    assert len(hub.repositories[REPO].messages) == 1
    assert set(hub.received.values()) == {1}
    assert not staging_of(Path("llama-W8A8").absolute()).exists()


def interrupted(hub: Hub) -> None:
    """Send all but one shard."""
    hub.uploads_left, hub.then = SHARDS - 1, HTTPStatus.CONFLICT
    with pytest.raises(HubError):
        push()
    hub.uploads_left = None


FAULTS = [HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.CONFLICT, HTTPStatus.FORBIDDEN,
          HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, "cut"]  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, None, *FAULTS]), max_size=30))
def test_whatever_the_hub_does_it_shows_the_result_whole_or_not_at_all(
    hub: Hub, whole: Files, faults: list[HTTPStatus | str | None]
) -> None:
    hub.repositories.clear()
    hub.objects.clear()
    hub.received.clear()
    shutil.rmtree(staging_of(Path("llama-W8A8").absolute()), ignore_errors=True)
    left = list(faults)
    hub.fault = lambda _method, path: left.pop() if left and "/resolve/" not in path else None
    for _ in range(len(faults) + 1):
        try:
            push()
            break
        except W8A8Error:
            assert all(not files or set(whole) <= {*files} for files in [r.files for r in hub.repositories.values()])
    assert shown(hub) == whole
    assert set(hub.received.values()) == {1}
