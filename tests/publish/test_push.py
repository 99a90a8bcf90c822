import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from socket import create_server

import pytest

import w8a8
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.command import W8A8, cli
from tests.publish.hub import TOKEN, Hub, Repository, receiving_hub
from tests.publish.results import kld
from w8a8.errors import HubError, PathEscapeError, UsageError, W8A8Error
from w8a8.publish.push import check, prepare

pytestmark = pytest.mark.slow

REPO = "me/llama-W8A8"
Push = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with receiving_hub() as hub:
        yield hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A quantized Llama in four shards."""
    source = write_checkpoint(tmp_path / "llama", llama_tensors(), shards=4)
    (source / "tokenizer.json").write_text("{}")
    w8a8.quantize(source, tmp_path / "llama-W8A8")
    return tmp_path / "llama-W8A8"


@pytest.fixture
def env(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a user of `hub`."""
    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def push(out: Path, env: Mapping[str, str]) -> Push:
    """`w8a8 push OUT REPO ...` as a user runs it."""
    return lambda *args, **more: cli("push", out, *(args or (REPO,)), env={**env, **more})


def refused(run: "subprocess.CompletedProcess[str]", error: type[W8A8Error], *mentions: str) -> None:
    """One line with all `mentions`, and the exit code of `error`."""
    lines = [line for line in run.stderr.splitlines() if line.startswith("w8a8: error: ")]
    assert run.returncode == error.exit_code, run.stderr
    assert len(lines) == 1
    assert "Traceback" not in run.stderr
    assert [mention for mention in mentions if mention not in lines[0]] == [], lines[0]


def test_a_checkpoint_arrives_byte_for_byte_in_a_private_repository(hub: Hub, out: Path, push: Push) -> None:
    run = push(REPO, "--json")
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert hub.repositories[REPO].files == folder_bytes(out)
    assert hub.repositories[REPO].private
    assert said["url"] == f"{hub.url}/{REPO}"
    assert said["private"] is True
    assert set(said["files"]) == set(folder_bytes(out))


def test_public_makes_a_public_repository(hub: Hub, push: Push) -> None:
    assert push(REPO, "--public").returncode == 0
    assert not hub.repositories[REPO].private


def test_hf_repo_id_is_the_default(hub: Hub, out: Path, env: Mapping[str, str]) -> None:
    run = cli("push", out, env={**env, "HF_REPO_ID": REPO})
    assert run.returncode == 0, run.stderr
    assert f"{hub.url}/{REPO}" in run.stdout.replace("\n", "")
    assert REPO in hub.repositories


def test_without_a_repository_it_says_how_to_name_one(out: Path, env: Mapping[str, str]) -> None:
    refused(cli("push", out, env=env), UsageError, "REPO", "HF_REPO_ID")


def test_hidden_files_stay_here(hub: Hub, out: Path, push: Push) -> None:
    (out / ".cache" / "huggingface").mkdir(parents=True)
    (out / ".cache" / "huggingface" / "state").write_text("x")
    (out / ".env").write_text("SECRET")
    (out / "report").mkdir()
    (out / "report" / ".draft").write_text("x")
    (out / "report" / "errors.png").write_bytes(b"png")
    assert push().returncode == 0
    assert {n for n in hub.repositories[REPO].files if "/" in n or n.startswith(".")} == {"report/errors.png"}


def test_what_arrived_before_a_kill_is_not_sent_again(hub: Hub, out: Path, push: Push, env: Mapping[str, str]) -> None:
    hub.uploads_left = 2
    kill_once_stuck(hub, [*W8A8, "push", str(out), REPO], env)
    arrived = set(hub.objects)
    assert len(arrived) == 2
    assert not hub.repositories[REPO].files

    hub.uploads_left = None
    assert push().returncode == 0
    assert hub.repositories[REPO].files == folder_bytes(out)
    assert {hub.received[oid] for oid in arrived} == {1}


def kill_once_stuck(hub: Hub, command: list[str], env: Mapping[str, str]) -> None:
    """Run `command`, and kill it when the Hub has taken all that it takes."""
    with subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.DEVNULL) as process:
        try:
            while hub.uploads_left is not None and hub.uploads_left >= 0 and process.poll() is None:
                time.sleep(0.01)
        finally:
            process.kill()


def test_an_upload_the_hub_stops_is_one_line_and_goes_on(hub: Hub, out: Path, push: Push) -> None:
    hub.uploads_left, hub.then = 3, HTTPStatus.CONFLICT  # a broken connection is retried for half a minute first
    refused(push(), HubError, "no more for now", "the same command goes on")
    assert len(hub.objects) == 3

    hub.uploads_left = None
    assert push().returncode == 0
    assert hub.repositories[REPO].files == folder_bytes(out)
    assert set(hub.received.values()) == {1}


def test_through_xet_the_same_files_arrive_and_none_twice(hub: Hub, out: Path, push: Push) -> None:
    hub.repositories[REPO] = Repository(private=True)
    hub.readonly = True
    refused(push(REPO, HF_HUB_DISABLE_XET="0"), HubError, "you may read only")
    sent = dict(hub.xorbs)
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert sum(map(len, sent.values())) > 0.9 * weights
    assert not hub.repositories[REPO].files

    hub.readonly = False
    hub.requests.clear()
    run = push(REPO, HF_HUB_DISABLE_XET="0")
    assert run.returncode == 0, run.stderr
    assert not [request for request in hub.requests if "xorbs" in request]
    committed = hub.repositories[REPO].files
    assert set(committed) == set(folder_bytes(out))
    for name, content in folder_bytes(out).items():
        if name.endswith(".safetensors"):
            assert committed[name] == f"sha256:{hashlib.sha256(content).hexdigest()}".encode()
    assert not hub.objects


def test_pushing_again_sends_nothing_that_is_there(hub: Hub, out: Path, push: Push) -> None:
    assert push().returncode == 0
    hub.requests.clear()
    (out / "README.md").write_text("# New\n")
    assert push().returncode == 0
    assert not [request for request in hub.requests if request.startswith("PUT")]
    assert hub.repositories[REPO].files["README.md"] == b"# New\n"


def test_a_wrong_token_is_refused_with_what_to_do(hub: Hub, push: Push) -> None:
    refused(push(REPO, HF_TOKEN="hf_wrong"), HubError, "hf auth login")
    assert not hub.repositories


def test_without_a_token_it_says_so(hub: Hub, push: Push) -> None:
    refused(push(REPO, HF_TOKEN=""), HubError, "no token", "hf auth login")
    assert not hub.requests


def test_a_token_that_may_not_write_is_refused(hub: Hub, push: Push) -> None:
    hub.readonly = True
    refused(push(), HubError, "may not write", "you may not create here")
    hub.repositories[REPO] = Repository(private=True)
    refused(push(), HubError, "may not write", "you may read only")


def test_an_existing_private_repository_is_used_and_stays_private(hub: Hub, out: Path, push: Push) -> None:
    hub.repositories[REPO] = Repository(private=True)
    run = push(REPO, "--public")
    assert run.returncode == 0
    assert "stays so" in run.stderr
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].files == folder_bytes(out)


def test_a_public_repository_gets_nothing_unless_public_was_said(hub: Hub, out: Path, push: Push) -> None:
    hub.repositories[REPO] = Repository(private=False)
    refused(push(), UsageError, "public", "--public")
    assert not hub.objects
    assert push(REPO, "--public").returncode == 0
    assert hub.repositories[REPO].files == folder_bytes(out)


def test_no_network_is_one_line(push: Push) -> None:
    with create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refused(push(REPO, HF_ENDPOINT=f"http://127.0.0.1:{port}"), HubError, REPO)


@pytest.mark.parametrize("repo", ["no-owner", "a/b/c", "me/sp ace", "me/..", "me/\x1b[31m", ""])
def test_an_impossible_id_is_refused(out: Path, repo: str) -> None:
    with pytest.raises(UsageError):
        prepare(out, repo)


def flip_a_bit(out: Path) -> str:
    shard = sorted(out.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return shard.name


def truncate(out: Path) -> str:
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    return shard.name


def change_the_index(out: Path) -> str:
    index = out / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["metadata"]["total_size"] += 1
    index.write_text(json.dumps(values))
    return index.name


def drop_the_quantization(out: Path) -> str:
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return "not quantized"


def forget_how(out: Path) -> str:
    (out / "w8a8.json").unlink()
    return "w8a8.json"


def garble_how(out: Path) -> str:
    (out / "w8a8.json").write_text('{"version": "0.1.0", "source": [], "shards": 3}')
    return "w8a8.json"


def edit_the_config(out: Path) -> str:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    return "config.json"


def edit_the_tokenizer(out: Path) -> str:
    (out / "tokenizer.json").write_text('{"x": 1}')
    return "tokenizer.json"


def lose_the_tokenizer(out: Path) -> str:
    (out / "tokenizer.json").unlink()
    return "tokenizer.json"


def reformat_the_index(out: Path) -> str:
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text())))
    return index.name


def add_weights(out: Path) -> str:
    (out / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return "pytorch_model.bin"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        truncate,
        change_the_index,
        drop_the_quantization,
        forget_how,
        garble_how,
        add_weights,
        edit_the_config,
        edit_the_tokenizer,
        lose_the_tokenizer,
        reformat_the_index,
    ],
)
def test_a_folder_that_fails_is_refused(damage: Callable[[Path], str], out: Path) -> None:
    check(prepare(out, REPO))
    mention = damage(out)
    with pytest.raises(W8A8Error, match=mention):
        check(prepare(out, REPO))


def test_a_corrupted_shard_is_refused_before_any_request(hub: Hub, out: Path, push: Push) -> None:
    shard = flip_a_bit(out)
    refused(push(), W8A8Error, "not uploaded", shard)
    assert not hub.requests


def test_with_the_source_everything_is_verified(hub: Hub, out: Path, push: Push) -> None:
    name = "model-00001-of-00004.safetensors"
    codes = bytearray((out / name).read_bytes())
    codes[-1] ^= 0x40
    (out / name).write_bytes(codes)
    made = json.loads((out / "w8a8.json").read_text())
    made["shards"][name]["sha256"] = hashlib.sha256(codes).hexdigest()
    (out / "w8a8.json").write_text(json.dumps(made))  # its own checksums hold again

    refused(push(REPO, "--source", out.parent / "llama"), W8A8Error, "not uploaded")
    assert not hub.requests


def test_a_dry_run_lists_what_would_go_and_asks_the_hub_nothing(hub: Hub, out: Path, push: Push) -> None:
    run = push(REPO, "--dry-run", "--json")
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert set(said["files"]) == set(folder_bytes(out))
    assert said["bytes"] == sum(map(len, folder_bytes(out).values()))
    assert said["url"] is None
    assert not hub.requests


def test_what_nothing_vouches_for_stays_and_is_named(hub: Hub, out: Path, push: Push) -> None:
    made = set(folder_bytes(out))
    go = {
        "README.md": "# Card",
        "LICENSE": "MIT",
        "report.html": "<p>",
        "figures/size.png": "png",
        "kld.json": json.dumps(kld()),
    }
    stay = ["id_rsa", ".env", "notes.md", "evil.py", "extra.json", "LICENSE.key", "sub/model.bin", "sub/a.safetensors"]
    stay += ["figures/x.bin", "wandb/run.json", "[a-z]*"]
    for name, text in {**go, **dict.fromkeys(stay, "{}")}.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / ".git" / "objects").mkdir(parents=True)
    (out / ".git" / "config").write_text("x")
    (out / "link").symlink_to(out / "figures")
    os.mkfifo(out / "pipe")
    left = {*stay, ".git/", "link", "pipe"}

    said = json.loads(push(REPO, "--dry-run", "--json").stdout)
    assert set(said["files"]) == made | set(go)
    assert {entry["name"] for entry in said["left"]} == left
    run = push(REPO)
    assert run.returncode == 0, run.stderr
    assert set(hub.repositories[REPO].files) == made | set(go)
    assert {line.split(": ")[1].split(" (")[0] for line in run.stdout.splitlines() if line.startswith("not up")} == left


def test_of_an_earlier_version_small_files_go_by_name_and_it_is_said(hub: Hub, out: Path, push: Push) -> None:
    values = json.loads((out / "w8a8.json").read_text())
    del values["files"]
    (out / "w8a8.json").write_text(json.dumps(values))
    (out / "id_rsa").write_text("x")
    run = push(REPO)
    assert run.returncode == 0, run.stderr
    assert "without checksums of small files; --source" in run.stderr
    assert set(hub.repositories[REPO].files) == set(folder_bytes(out)) - {"id_rsa"}

    (out / "tokenizer.json").write_text('{"x": 1}')
    refused(push(REPO, "--source", out.parent / "llama"), W8A8Error, "tokenizer.json: is not the source's")


def test_a_link_out_of_the_folder_is_not_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (out / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(PathEscapeError, match="secret"):
        prepare(out, REPO)
