"""Checkpoints on the Hub by their headers, over real HTTP."""

import json
import struct
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.hub import Hub, local_hub
from tests.checkpoints import LLAMA, folder_bytes, llama_tensors, write_checkpoint
from tests.command import cli, python
from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.remote import FIRST_BYTES
from w8a8.errors import (
    HeaderError,
    HeaderTooLargeError,
    HubError,
    InvalidIndexError,
    MissingTensorError,
    NoConfigError,
    PathEscapeError,
    PickleOnlyError,
    SourceNotFoundError,
    TruncatedShardError,
    W8A8Error,
)

pytestmark = pytest.mark.slow

MEGABYTES = 40
FAILING = """
import sys
import threading
from pathlib import Path
from w8a8.checkpoint.hub import HubFolder
from w8a8.checkpoint.remote import lay_out
from w8a8.errors import HubError
repo, folder, failed = sys.argv[1:]
try:
    lay_out(HubFolder.find(repo, None), Path(folder))
except HubError:
    Path(failed).touch()
    for thread in {*threading.enumerate()} - {threading.current_thread()}:
        thread.join()
else:
    sys.exit("nothing failed")
"""
"""Lays out a repository of which a shard fails, says so in a file, and waits for all threads."""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A small Llama in two shards, one with much data, one with a long header, and what nobody should have."""
    root = tmp_path_factory.mktemp("repositories")
    llama = write_checkpoint(root / "llama", llama_tensors(), shards=2)
    big = {**llama_tensors(), "model.layers.9.mlp.up_proj.weight": ("I8", np.zeros((MEGABYTES, 10**6), np.int8))}
    write_checkpoint(root / "big", big)
    many = {f"model.layers.{i}.mlp.up_proj.weight": ("I8", np.zeros((1, 8), np.int8)) for i in range(2000)}
    write_checkpoint(root / "many", many)
    return {
        "org/llama": folder_bytes(llama),
        "org/big": folder_bytes(root / "big"),
        "org/many": folder_bytes(root / "many"),
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02."},
    }


@pytest.fixture
def hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    with local_hub(dict(repositories)) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Mapping[str, str]:
    """The environment of a client of `hub`, with a cache of its own."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}


def tensors_seen(source: str, env: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes of what `w8a8 inspect --tensors` sees, by name."""
    run = cli("inspect", source, "--tensors", "--json", env=env)
    assert run.returncode == 0, run.stderr
    return {t["name"]: (t["dtype"], tuple(t["shape"]), t["nbytes"]) for t in json.loads(run.stdout)["specs"]}


def assert_refused(source: str, error: type[W8A8Error], *mentions: str, env: Mapping[str, str]) -> None:
    """`inspect` ends with the exit code of `error` and one line with all `mentions`."""
    run = cli("inspect", source, env=env)
    assert run.returncode == error.exit_code, run.stderr
    [line] = run.stderr.splitlines()
    assert [mention for mention in mentions if mention not in line] == [], line


def until(path: Path) -> None:
    """Wait for a file, but not for ever."""
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def with_file(hub: Hub, name: str, content: bytes, repo: str = "org/llama") -> str:
    """A copy of a repository in which one file is another; its id."""
    hub.repositories = {**hub.repositories, "org/changed": {**hub.repositories[repo], name: content}}
    return "org/changed"


@pytest.mark.parametrize("repo", ["org/llama", "org/llama@v1", "org/big", "org/many"])
def test_the_headers_are_those_of_the_files(hub: Hub, client: Mapping[str, str], tmp_path: Path, repo: str) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    for name, content in hub.repositories[repo.partition("@")[0]].items():
        (folder / name).write_bytes(content)
    expected = {name: (t.dtype, t.shape, t.nbytes) for name, t in Checkpoint.open(folder).tensors.items()}
    assert tensors_seen(repo, client) == expected


def test_of_a_big_file_only_the_header_is_transferred(hub: Hub, client: Mapping[str, str]) -> None:
    assert sum(nbytes for _, _, nbytes in tensors_seen("org/big", client).values()) > MEGABYTES * 10**6
    assert hub.sent < 2 * FIRST_BYTES


def test_a_server_that_sends_everything_is_stopped(hub: Hub, client: Mapping[str, str]) -> None:
    hub.ranges = False
    assert len(tensors_seen("org/big", client)) == len(llama_tensors()) + 1
    assert hub.sent < MEGABYTES * 10**6 / 2


def test_nothing_is_left_in_the_cache_or_elsewhere(hub: Hub, client: Mapping[str, str], tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    tensors_seen("org/llama", {**client, "TMPDIR": str(tmp_path / "tmp")})
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_in_the_cache_is_not_asked_for(hub: Hub, client: Mapping[str, str]) -> None:
    fetched = python("-c", "from w8a8.checkpoint import resolve; resolve('org/llama')", env=client)
    assert fetched.returncode == 0, fetched.stderr
    hub.requests.clear()
    assert len(tensors_seen("org/llama", client)) == len(llama_tensors())
    assert hub.requests == []


def test_half_a_download_is_no_checkpoint_and_the_hub_is_asked(
    hub: Hub, client: Mapping[str, str], tmp_path: Path
) -> None:
    python("-c", "from w8a8.checkpoint import resolve; resolve('org/llama')", env=client)
    for shard in tmp_path.rglob("snapshots/*/*-00002-of-00002.safetensors"):
        shard.unlink()
    assert len(tensors_seen("org/llama", client)) == len(llama_tensors())


def test_fit_reads_a_hub_id(hub: Hub, client: Mapping[str, str]) -> None:
    config = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    repo = with_file(hub, "config.json", json.dumps(config).encode())
    run = cli("fit", repo, "--gpu", "8GiB", "--json", env=client)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["name"] == "changed"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (struct.pack("<Q", 2**60) + b"{}", HeaderTooLargeError),
        (struct.pack("<Q", 99_000_000) + b"{}", HeaderTooLargeError),
        (struct.pack("<Q", 2) + b"[]", HeaderError),
        (b"<html>not here</html>", HeaderTooLargeError),
        (b"", TruncatedShardError),
        (struct.pack("<Q", 2) + b"{}", MissingTensorError),
    ],
)
def test_a_shard_that_is_none_is_refused(
    hub: Hub, client: Mapping[str, str], content: bytes, error: type[W8A8Error]
) -> None:
    assert_refused(with_file(hub, "model-00002-of-00002.safetensors", content), error, "org/changed", env=client)


@pytest.mark.parametrize(
    ("length", "error"),
    [("100", W8A8Error), ("9" * 13, HubError), ("9" * 40, HubError), ("*", HubError), ("-5", HubError)],
)
def test_a_length_that_cannot_be_is_refused(
    hub: Hub, client: Mapping[str, str], length: str, error: type[W8A8Error]
) -> None:
    hub.lengths["model-00001-of-00002.safetensors"] = length
    run = cli("inspect", "org/llama", env=client)
    assert run.returncode == error.exit_code or (error is W8A8Error and 19 <= run.returncode <= 23), run.stderr
    assert "Traceback" not in run.stderr
    assert "org/llama" in run.stderr


def test_once_a_shard_has_failed_no_other_is_written(hub: Hub, client: Mapping[str, str], tmp_path: Path) -> None:
    folder, failed = tmp_path / "folder", tmp_path / "failed"
    folder.mkdir()
    hub.lengths["model-00001-of-00002.safetensors"] = "-5"
    hub.pace = lambda name, _begin: until(failed) if name == "model-00002-of-00002.safetensors" else None
    run = python("-c", FAILING, "org/llama", str(folder), str(failed), env=client)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", b"{", NoConfigError),
        ("config.json", b"[" * 10000, NoConfigError),
        ("model.safetensors.index.json", b"{}", InvalidIndexError),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}', PathEscapeError),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "sub/x.safetensors"}}', InvalidIndexError),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "none.safetensors"}}', HubError),
    ],
)
def test_a_garbled_config_or_index_is_refused(
    hub: Hub, client: Mapping[str, str], name: str, content: bytes, error: type[W8A8Error]
) -> None:
    assert_refused(with_file(hub, name, content), error, "org/changed", env=client)


def test_a_redirect_loop_ends(hub: Hub, client: Mapping[str, str]) -> None:
    hub.redirecting = True
    assert_refused("org/llama", HubError, "org/llama", "redirect", env=client)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("org/nothing", SourceNotFoundError, "no such repository"),
        ("org/llama@v9", SourceNotFoundError, "the revision does not"),
        ("org/double--dash", SourceNotFoundError, "not a Hub id"),
        ("nothing", SourceNotFoundError, "no such folder"),
        ("org/pickles", PickleOnlyError, "no safetensors"),
    ],
)
def test_what_the_hub_does_not_have_is_not_found(
    client: Mapping[str, str], source: str, error: type[W8A8Error], says: str
) -> None:
    assert_refused(source, error, source, says, env=client)


def test_a_gated_repository_says_how_to_get_in(hub: Hub, client: Mapping[str, str]) -> None:
    hub.gated = True
    assert_refused("org/llama", HubError, "org/llama", "gated", "HF_TOKEN", env=client)


def test_a_hub_that_fails_is_reported(hub: Hub, client: Mapping[str, str]) -> None:
    hub.failing = HTTPStatus.SERVICE_UNAVAILABLE
    assert_refused("org/llama", HubError, "org/llama", "503", env=client)


@pytest.mark.parametrize("spared", [{}, {"NO_PROXY": "corp.example"}, {"no_proxy": "*"}])
def test_a_hub_on_this_machine_is_asked_without_a_proxy(client: Mapping[str, str], spared: Mapping[str, str]) -> None:
    nobody = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    env = {**client, **nobody, "NO_PROXY": "", "no_proxy": "", **spared}
    assert len(tensors_seen("org/llama", env)) == len(llama_tensors())


def test_offline_nothing_is_asked_for(hub: Hub, client: Mapping[str, str]) -> None:
    assert_refused("org/llama", HubError, "org/llama", "offline", env={**client, "HF_HUB_OFFLINE": "1"})
    assert hub.requests == []
