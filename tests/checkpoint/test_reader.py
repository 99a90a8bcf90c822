"""A checkpoint is opened whole, or refused with an error of its own."""

import json
import shutil
import tracemalloc
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.damages import DAMAGES, FIRST, SECOND, Damage
from tests.checkpoint.files import edit_json, hub_cache
from tests.checkpoints import llama_tensors, read_tensor, tensor_bytes, write_checkpoint, write_shard
from tests.command import assert_refused
from w8a8 import quantize, verify
from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.reader import INDEX
from w8a8.errors import (
    InvalidIndexError,
    MissingTensorError,
    NoConfigError,
    PathEscapeError,
    SourceNotFoundError,
    UnreadableError,
    UsageError,
    W8A8Error,
)


@pytest.mark.parametrize(("error", "change", "mentions"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_own_exit_code_and_one_line(
    llama: Path, tmp_path: Path, error: type[W8A8Error], change: Damage, mentions: list[str]
) -> None:
    change(llama)

    assert_refused(llama, tmp_path / "out", error, *mentions)


def test_every_error_has_an_exit_code_of_its_own() -> None:
    def family(error: type[W8A8Error]) -> list[type[W8A8Error]]:
        return [error, *(child for direct in error.__subclasses__() for child in family(direct))]

    codes = [error.exit_code for error in family(W8A8Error)]

    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(("name", "error"), [("config.json", NoConfigError), (INDEX, InvalidIndexError)])
@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"[" * 99_000_000, "larger than"), (b'{"a": [' + b"[]," * 3_000_000 + b"0]}", "more than 1,000,000 values")],
)
def test_json_of_too_much_is_refused_before_it_is_parsed(
    llama: Path, name: str, error: type[W8A8Error], text: bytes, reason: str
) -> None:
    (llama / name).write_bytes(text)

    tracemalloc.start()
    with pytest.raises(error, match=f"{name}.*{reason}"):
        Checkpoint.open(llama)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 20_000_000


def test_a_byte_order_mark_before_json_is_no_harm(llama: Path) -> None:
    healthy = Checkpoint.open(llama)
    for name in ("config.json", INDEX):
        (llama / name).write_bytes(BOM_UTF8 + (llama / name).read_bytes())

    assert Checkpoint.open(llama) == healthy


# --- permissions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [".", "..", "config.json", INDEX, FIRST, "tokenizer.json", "additional_chat_templates"]
)
def test_what_may_not_be_read_is_named_before_a_weight_is_read(llama: Path, tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "private" / "llama"
    shutil.copytree(llama, checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "additional_chat_templates").mkdir()
    hidden = (checkpoint / name).resolve()
    hidden.chmod(0)
    try:
        named = str(checkpoint if hidden in checkpoint.parents else hidden)
        assert_refused(checkpoint, tmp_path / "out", UnreadableError, named, "denied", obey_permissions=True)
    finally:
        hidden.chmod(0o700)


# --- what is opened -----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_opened_whole(llama: Path) -> None:
    tensors = llama_tensors()

    checkpoint = Checkpoint.open(llama)

    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.indexed
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND]
    assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == {
        name: (dtype, values.shape) for name, (dtype, values) in tensors.items()
    }
    for name, (dtype, values) in tensors.items():
        assert read_tensor(checkpoint, checkpoint.tensors[name]) == tensor_bytes(values, dtype)
    assert checkpoint.numel == sum(values.size for _, values in tensors.values())
    assert checkpoint.nbytes == 2 * checkpoint.numel


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "consolidated.safetensors"])
def test_a_single_file_needs_no_index_whatever_its_name(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "m", llama_tensors())
    (folder / "model.safetensors").rename(folder / name)

    checkpoint = Checkpoint.open(folder)

    assert [shard.name for shard in checkpoint.shards] == [name]
    assert not checkpoint.indexed


def test_a_consolidated_duplicate_is_left_out(llama: Path) -> None:
    write_shard(llama / "consolidated.safetensors", llama_tensors())

    checkpoint = Checkpoint.open(llama)

    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND]
    assert [left.name for left in checkpoint.left_out] == ["consolidated.safetensors"]


def test_of_a_single_file_and_an_index_the_file_counts_as_in_transformers(llama: Path) -> None:
    shards = [shard.name for shard in Checkpoint.open(llama).shards]
    write_shard(llama / "model.safetensors", llama_tensors())

    checkpoint = Checkpoint.open(llama)

    assert not checkpoint.indexed
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert {left.name: left.reason for left in checkpoint.left_out} == dict.fromkeys(
        [*shards, INDEX], "a duplicate of the weights, which transformers does not read"
    )


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """A checkpoint whose index still names the head that no shard holds."""
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "headless", tensors, shards=2)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": FIRST}))
    return folder


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_tied_head_that_only_the_index_names_is_said_and_nothing_else(headless: Path, said: dict[str, Any]) -> None:
    edit_json(headless / "config.json", lambda config: config.update(said))

    [left] = Checkpoint.open(headless).left_out

    assert left.name == "lm_head.weight"
    assert "tied to the embeddings" in left.reason


@pytest.mark.parametrize("said", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}])
def test_a_head_of_its_own_that_only_the_index_names_is_missing(headless: Path, said: dict[str, Any]) -> None:
    edit_json(headless / "config.json", lambda config: config.update(said))

    with pytest.raises(MissingTensorError, match=r"lm_head\.weight"):
        Checkpoint.open(headless)


def test_without_its_tied_head_a_checkpoint_is_quantized_and_verified(headless: Path, tmp_path: Path) -> None:
    edit_json(headless / "config.json", lambda config: config.update(tie_word_embeddings=True))
    (headless / "1_Pooling").mkdir()
    (headless / "1_Pooling" / "config.json").write_text("{}")
    (headless / "modules.json").write_text('[{"path": "1_Pooling"}]')
    with (headless / "big.txt").open("wb") as file:
        file.truncate(200_000_000)

    tracemalloc.start()
    result = quantize(headless, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert dict(result.plan.left_out).keys() == {"lm_head.weight"}
    assert peak < 150_000_000
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert "lm_head.weight" not in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert verify(tmp_path / "out", headless).ok
    (tmp_path / "out" / "big.txt").unlink()


def test_links_within_the_folder_are_followed(llama: Path) -> None:
    (llama / "data").mkdir()
    (llama / FIRST).rename(llama / "data" / "first")
    (llama / FIRST).symlink_to("data/first")

    assert len(Checkpoint.open(llama).shards) == 2


def test_a_link_to_the_folder_itself_is_as_good_as_the_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)

    assert Checkpoint.open(tmp_path / "link").tensors == Checkpoint.open(llama).tensors


def test_a_hub_cache_snapshot_may_link_into_the_blobs_of_its_repository(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    expected = Checkpoint.open(llama).tensors

    snapshot = hub_cache(tmp_path / "hub", llama, "org/name", "c0ffee")

    opened = Checkpoint.open(snapshot)
    assert opened.tensors == expected
    assert "tokenizer.json" in opened.sidecars


def test_a_hub_cache_snapshot_may_not_link_into_another_repository(llama: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", llama, "org/name", "c0ffee")
    stranger = tmp_path / "hub" / "models--org--other" / "blobs" / "0"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(stranger)

    with pytest.raises(PathEscapeError, match=r"tokenizer\.json"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize(("name", "says"), [("nothing", "no such folder"), ("llama/config.json", "(a file)")])
def test_what_is_no_folder_is_not_found(llama: Path, name: str, says: str) -> None:
    with pytest.raises(SourceNotFoundError) as raised:
        Checkpoint.open(llama.parent / name)

    assert says in str(raised.value)


@pytest.mark.parametrize("address", ["s3://bucket/folder", "gs://bucket/folder"])
def test_an_address_where_only_a_folder_is_possible_is_named(address: str) -> None:
    with pytest.raises(UsageError, match=f"{address}: this command reads files here; copy the folder first"):
        Checkpoint.open(Path(address))
