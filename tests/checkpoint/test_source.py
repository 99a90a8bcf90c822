import json
import os
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from socket import create_server
from time import perf_counter

import pytest

from tests.checkpoint.files import hub_cache
from tests.checkpoint.hub import COMMIT, Hub, local_hub
from tests.checkpoints import folder_bytes
from tests.command import assert_refused, cli, python
from w8a8.checkpoint import Source, resolve
from w8a8.errors import HubError, PickleOnlyError, SourceNotFoundError, UnreadableError

pytestmark = pytest.mark.slow

RESOLVE = """
import sys
from w8a8.checkpoint import resolve
source = resolve(sys.argv[1])
print(source.path, source.name, source.revision, sep="\\n")
"""
NEEDED = {
    "tokenizer.json": b"{}",
    "LICENSE": b"Apache",
    "additional_chat_templates/tool.jinja": b"{{ tool }}",
    "modules.json": b'[{"path": ""}, {"path": "2_Dense"}]',
    "2_Dense/model.safetensors": b"a layer",
}
NOT_NEEDED = {
    "consolidated.safetensors": b"",
    "figures/architecture.svg": b"",
    "flax_model.msgpack": b"",
    "model-Q4_K_M.gguf": b"",
    "onnx/model.onnx_data": b"",
    "original/consolidated.00.pth": b"",
    "photo.png": b"",
    "pytorch_model.bin": b"",
    "pytorch_model.bin.index.json": b"",
    "vae/model.safetensors": b"",
    "4bit/model.safetensors": b"",
    "16_bit/model.safetensors": b"",
}


@pytest.fixture
def hub(llama: Path) -> Iterator[Hub]:
    """A Hub with the small Llama as `org/llama`, and a repository of pickles."""
    repositories = {
        "org/llama": {**folder_bytes(llama), **NEEDED, **NOT_NEEDED},
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02."},
        "org/empty": {"README.md": b""},
    }
    with local_hub(repositories) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The environment of a client of `hub`, with a cache of its own."""
    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}


def resolved(source: str, env: Mapping[str, str]) -> Source:
    """`resolve(source)` in a process of its own: huggingface_hub reads its environment once."""
    run = python("-c", RESOLVE, source, env=env)
    assert run.returncode == 0, run.stderr
    path, name, revision = run.stdout.splitlines()
    return Source(Path(path), name, revision)


# --- local folders ------------------------------------------------------------------------------------------------


def test_a_folder_goes_by_its_own_name(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)

    assert resolve(llama) == Source(llama, "llama")
    assert resolve(".") == Source(Path(), "llama")


def test_a_folder_wins_over_a_hub_id(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent.parent)
    source = f"{llama.parent.name}/llama"

    assert resolve(source) == Source(Path(source), "llama")


def test_a_hub_cache_snapshot_goes_by_its_repository_and_commit(llama: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", llama, "org/some--name", COMMIT)

    assert resolve(snapshot) == Source(snapshot, "org/some--name", COMMIT)


def test_a_snapshot_is_recognized_through_a_link(llama: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", llama, "org/name", COMMIT)
    (tmp_path / "link").symlink_to(snapshot)

    assert resolve(tmp_path / "link") == Source(snapshot, "org/name", COMMIT)


def test_a_snapshot_is_quantized_and_its_commit_recorded(llama: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", llama, "org/name", COMMIT)

    run = cli("quantize", snapshot, tmp_path / "out", "--quiet")

    assert run.returncode == 0, run.stderr
    source = json.loads((tmp_path / "out" / "w8a8.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("org/name", COMMIT)


def test_a_folder_whose_name_is_not_utf8_can_be_quantized(llama: Path, tmp_path: Path) -> None:
    folder = llama.rename(os.fsdecode(os.fsencode(tmp_path) + b"/lla\xe4ma"))

    run = cli("quantize", folder, tmp_path / "out", "--quiet")

    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "w8a8.json").read_text())["source"]["name"] == "lla\ufffdma"


@pytest.mark.parametrize("source", ["nothing", "./org/name", "a/b/c", "org/name@", "https://huggingface.co/a/b"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SourceNotFoundError, match="no such folder"):
        resolve(source)


def test_a_file_is_no_source(llama: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="give the folder"):
        resolve(llama / "config.json")


def test_a_name_too_long_for_a_folder_is_unreadable() -> None:
    with pytest.raises(UnreadableError, match="too long"):
        resolve("a" * 5000)


# --- the Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_hub_id_is_downloaded_and_goes_by_its_commit(hub: Hub, client: Mapping[str, str], revision: str) -> None:
    source = resolved(f"org/llama{revision}", client)

    assert (source.name, source.revision) == ("org/llama", COMMIT)
    assert source.path.is_relative_to(client["HF_HOME"])


def test_only_what_the_result_needs_is_fetched(hub: Hub, client: Mapping[str, str]) -> None:
    source = resolved("org/llama", client)

    wanted = {name: data for name, data in hub.repositories["org/llama"].items() if name not in NOT_NEEDED}
    assert hub.downloads == wanted.keys()
    assert folder_bytes(source.path) == wanted


def test_what_was_fetched_is_not_fetched_again(hub: Hub, client: Mapping[str, str]) -> None:
    first = resolved("org/llama", client)
    hub.requests.clear()

    assert resolved("org/llama", client) == first
    assert hub.downloads == set()


@pytest.mark.parametrize(("token", "sent"), [({"HF_TOKEN": "hf_secret"}, "Bearer hf_secret"), ({}, None)])
def test_the_token_is_sent_if_there_is_one(
    hub: Hub, client: Mapping[str, str], token: Mapping[str, str], sent: str | None
) -> None:
    resolved("org/llama", {**client, **token})

    assert {request.token for request in hub.requests if "org/llama" in request.path} == {sent}


def test_a_hub_id_is_quantized_and_its_commit_recorded(client: Mapping[str, str], tmp_path: Path) -> None:
    run = cli("quantize", "org/llama@v1", tmp_path / "out", "--quiet", env=client)

    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    source = json.loads((tmp_path / "out" / "w8a8.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("org/llama", COMMIT)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_bytes() == b"{{ tool }}"


@pytest.mark.parametrize("repo", ["org/pickles", "org/empty"])
def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(
    hub: Hub, client: Mapping[str, str], tmp_path: Path, repo: str
) -> None:
    assert_refused(repo, tmp_path / "out", PickleOnlyError, repo, "no safetensors", env=client)

    assert hub.downloads == set()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("org/nothing", "no such repository"),
        ("org/llama@v9", "the revision does not"),
        (f"org/llama@{'0' * 40}", "the revision does not"),
        ("org/double--dash", "not a Hub id"),
        ("../nothing", "not a Hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_not_found(
    client: Mapping[str, str], tmp_path: Path, source: str, says: str
) -> None:
    assert_refused(source, tmp_path / "out", SourceNotFoundError, source, says, env=client)


def test_a_gated_repository_says_how_to_get_in(hub: Hub, client: Mapping[str, str], tmp_path: Path) -> None:
    hub.gated = True

    assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", "gated", "HF_TOKEN", env=client)


@pytest.mark.parametrize("status", [HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE])
def test_a_hub_that_fails_is_reported_at_once(
    hub: Hub, client: Mapping[str, str], tmp_path: Path, status: HTTPStatus
) -> None:
    hub.failing = status

    start = perf_counter()
    assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", str(int(status)), env=client)

    assert perf_counter() - start < 10


def test_a_hub_that_is_down_is_reported_at_once(client: Mapping[str, str], tmp_path: Path) -> None:
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    start = perf_counter()
    env = {**client, "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", "refused", env=env)

    assert perf_counter() - start < 10


def test_a_hub_that_never_answers_is_given_up(client: Mapping[str, str], tmp_path: Path) -> None:
    with create_server(("127.0.0.1", 0)) as silent:
        env = {**client, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}

        assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", "timed out", env=env)


def test_an_endpoint_that_is_no_hub_is_reported(client: Mapping[str, str], tmp_path: Path) -> None:
    env = {**client, "HF_ENDPOINT": "nonsense"}

    assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", env=env)


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_what_is_in_the_cache_needs_no_network(hub: Hub, client: Mapping[str, str], revision: str) -> None:
    online = resolved(f"org/llama{revision}", client)
    hub.requests.clear()

    assert resolved(f"org/llama{revision}", {**client, "HF_HUB_OFFLINE": "1"}) == online
    assert hub.requests == []


def test_what_is_in_the_cache_serves_while_the_hub_is_down(hub: Hub, client: Mapping[str, str]) -> None:
    online = resolved("org/llama", client)
    hub.failing = HTTPStatus.SERVICE_UNAVAILABLE

    assert resolved("org/llama", client) == online


def test_what_is_not_in_the_cache_cannot_be_had_offline(client: Mapping[str, str], tmp_path: Path) -> None:
    env = {**client, "HF_HUB_OFFLINE": "1"}

    assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", "in the cache", "offline", env=env)


def test_half_a_download_is_not_taken_for_a_checkpoint_offline(client: Mapping[str, str], tmp_path: Path) -> None:
    shard = resolved("org/llama", client).path / "model-00002-of-00002.safetensors"
    shard.unlink()
    env = {**client, "HF_HUB_OFFLINE": "1"}

    assert_refused("org/llama", tmp_path / "out", HubError, "org/llama", "not whole", "offline", env=env)
