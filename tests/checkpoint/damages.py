"""Ways to damage a healthy checkpoint: each with the error that refuses it, and what the message mentions."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.checkpoint.files import edit_header, edit_json, raw_shard
from tests.checkpoints import llama_tensors, write_checkpoint
from w8a8.checkpoint.reader import INDEX
from w8a8.errors import (
    AlreadyQuantizedError,
    DuplicateTensorError,
    HeaderError,
    HeaderTooLargeError,
    InvalidIndexError,
    MissingShardError,
    MissingTensorError,
    NoConfigError,
    NonFiniteWeightError,
    NothingToQuantizeError,
    NoWeightsError,
    OffsetsError,
    PathEscapeError,
    PickleOnlyError,
    TensorSizeError,
    TruncatedShardError,
    UnreadableError,
    W8A8Error,
)

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[type[W8A8Error], Damage, list[str]]] = {}


def damage(error: type[W8A8Error], *mentions: str) -> Callable[[Damage], Damage]:
    """Register a way to damage a healthy checkpoint, how it is refused and what the message mentions."""

    def register(change: Damage) -> Damage:
        DAMAGES[change.__name__] = (error, change, list(mentions))
        return change

    return register


def mapped(folder: Path, **shards: str | None) -> None:
    """Say in the index that a tensor is in a shard."""
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(shards))


def first_of(folder: Path, shard: str) -> str:
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return next(name for name, home in weight_map.items() if home == shard)


# --- config -------------------------------------------------------------------------------------------------------


@damage(NoConfigError, "no config.json")
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@damage(NoConfigError, "params.json")
def mistral_config_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "params.json")


@damage(NoConfigError, "config.json", "not a valid config")
def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'model_type': 'llama'}")


@damage(NoConfigError, "config.json", "not a JSON object")
def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@damage(NoConfigError, "config.json", "utf-8")
def config_not_utf8(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')


@damage(NoConfigError, "config.json", "surrogates")
def config_with_half_a_character(folder: Path) -> None:
    (folder / "config.json").write_text(r'{"model_type": "llama", "name": "\ud800"}')


@damage(NoConfigError, "config.json", "nested too deeply")
def config_nested_deeply(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200)


@damage(NoConfigError, "config.json", "nested too deeply")
def config_nested_endlessly(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


@damage(NoConfigError, "config.json", "not a regular file")
def config_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@damage(NoConfigError, "config.json", "not a regular file")
def config_is_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@damage(UnreadableError, "config.json", "No such file")
def config_is_a_dangling_link(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.original.json")


@damage(UnreadableError, "config.json", "symbolic links")
def config_is_a_link_to_itself(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


@damage(AlreadyQuantizedError, "quant_method gptq")
def quantized_by_its_config(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))


@damage(AlreadyQuantizedError, Q_PROJ, "I8")
def quantized_by_its_weights(folder: Path) -> None:
    write_checkpoint(folder, llama_tensors() | {Q_PROJ: ("I8", np.zeros((64, 64), np.int8))}, shards=2)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 17082730\n"


@damage(NoConfigError, "config.json", "git-lfs pointer", "git lfs pull")
def config_is_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "config.json").write_text(POINTER)


# --- which files are the weights ----------------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()


@damage(NoWeightsError, "no safetensors")
def no_weights(folder: Path) -> None:
    without_weights(folder)


@damage(PickleOnlyError, "pytorch_model.bin", "save_pretrained")
def pickle_only(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


@damage(NoWeightsError, "adapter_model.safetensors", "merged")
def adapter_only(folder: Path) -> None:
    (folder / FIRST).rename(folder / "adapter_model.safetensors")
    (folder / SECOND).unlink()
    (folder / INDEX).unlink()


@damage(InvalidIndexError, INDEX, "download the index")
def shards_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()


# --- the index ----------------------------------------------------------------------------------------------------


@damage(InvalidIndexError, INDEX, "not a valid index")
def index_not_json(folder: Path) -> None:
    (folder / INDEX).write_text("")


@damage(InvalidIndexError, INDEX, "no weight_map")
def index_without_weight_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


@damage(InvalidIndexError, INDEX, "'a'", "None")
def index_maps_to_null(folder: Path) -> None:
    mapped(folder, a=None)


@damage(InvalidIndexError, INDEX, "'other.bin'")
def index_names_a_pickle(folder: Path) -> None:
    mapped(folder, a="other.bin")


@damage(MissingShardError, SECOND, "finish the download")
def shard_is_missing(folder: Path) -> None:
    (folder / SECOND).unlink()


@damage(MissingShardError, SECOND)
def shard_is_a_dangling_link(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("elsewhere.safetensors")


@damage(UnreadableError, "too long")
def shard_name_is_too_long_for_a_file(folder: Path) -> None:
    mapped(folder, a="a" * 300 + ".safetensors")


@damage(MissingTensorError, "'a'", FIRST)
def tensor_is_in_no_shard(folder: Path) -> None:
    mapped(folder, a=FIRST)


@damage(MissingTensorError, FIRST, SECOND)
def tensor_is_in_another_shard(folder: Path) -> None:
    mapped(folder, **{first_of(folder, FIRST): SECOND})


@damage(InvalidIndexError, FIRST, "the index does not name")
def tensor_is_not_in_the_index(folder: Path) -> None:
    name = first_of(folder, FIRST)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))


@damage(DuplicateTensorError, FIRST, SECOND)
def tensor_is_in_two_shards(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / SECOND)


# --- shards -------------------------------------------------------------------------------------------------------


@damage(TruncatedShardError, SECOND, "download it again")
def shard_is_truncated(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


@damage(TruncatedShardError, SECOND)
def shard_is_empty(folder: Path) -> None:
    os.truncate(folder / SECOND, 0)


@damage(HeaderTooLargeError, SECOND, "download it again")
def header_is_cut_off(folder: Path) -> None:
    os.truncate(folder / SECOND, 100)


@damage(HeaderTooLargeError, FIRST, "the format's")
def header_is_absurdly_large(folder: Path) -> None:
    raw_shard(folder / FIRST, b"{}", length=2**63)


@damage(HeaderError, FIRST, "not JSON")
def header_is_not_json(folder: Path) -> None:
    raw_shard(folder / FIRST, b"<!DOCTYPE html><html>Sign in</html>")


@damage(HeaderError, FIRST, "'F33'")
def dtype_is_unknown(folder: Path) -> None:
    name = first_of(folder, FIRST)
    edit_header(folder / FIRST, lambda header: header[name].update(dtype="F33"))


@damage(TensorSizeError, FIRST)
def shape_is_wrong(folder: Path) -> None:
    name = first_of(folder, FIRST)
    edit_header(folder / FIRST, lambda header: header[name]["shape"].append(2))


@damage(OffsetsError, FIRST, "overlaps")
def tensors_overlap(folder: Path) -> None:
    edit_header(folder / FIRST, lambda header: header.update(zz={"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}))


@damage(OffsetsError, FIRST, "hole")
def tensors_leave_a_hole(folder: Path) -> None:
    name = first_of(folder, FIRST)
    edit_header(folder / FIRST, lambda header: header.pop(name))


@damage(DuplicateTensorError, FIRST, "'a' twice")
def tensor_stands_twice_in_a_header(folder: Path) -> None:
    raw_shard(folder / FIRST, b'{"a": 1, "a": 2}')


# --- paths --------------------------------------------------------------------------------------------------------


@damage(PathEscapeError, "'../other.safetensors'")
def index_leads_up(folder: Path) -> None:
    mapped(folder, a="../other.safetensors")


@damage(PathEscapeError, "'/etc/passwd'")
def index_leads_to_the_root(folder: Path) -> None:
    mapped(folder, a="/etc/passwd")


@damage(InvalidIndexError, "'sub/model.safetensors'")
def index_leads_down(folder: Path) -> None:
    mapped(folder, a="sub/model.safetensors")


def move_out(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


@damage(PathEscapeError, SECOND, "outside")
def shard_links_out(folder: Path) -> None:
    move_out(folder, SECOND)


@damage(PathEscapeError, "config.json", "outside")
def config_links_out(folder: Path) -> None:
    move_out(folder, "config.json")


@damage(PathEscapeError, INDEX, "outside")
def index_links_out(folder: Path) -> None:
    move_out(folder, INDEX)


@damage(PathEscapeError, "tokenizer.json", "outside")
def sidecar_links_out(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    move_out(folder, "tokenizer.json")


@damage(PathEscapeError, "additional_chat_templates/tool.jinja", "outside")
def chat_templates_link_out(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("secret")
    move_out(folder, "additional_chat_templates")


@damage(UnreadableError, "tokenizer.json", "No such file")
def sidecar_is_a_dangling_link(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("gone.json")


@damage(UnreadableError, "tokenizer.json", "not a regular file")
def sidecar_is_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")


@damage(UnreadableError, "tokenizer.json", "git-lfs pointer", "git lfs pull")
def sidecar_is_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)


@damage(HeaderError, FIRST, "git-lfs pointer", "git lfs pull")
def shard_is_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / FIRST).write_text(POINTER)


@damage(HeaderError, FIRST, "not a regular file")
def shard_is_a_pipe(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


# --- weights ------------------------------------------------------------------------------------------------------


def with_value(folder: Path, value: float) -> None:
    """One shard whose q_proj has `value` in row 3."""
    tensors = llama_tensors()
    tensors[Q_PROJ][1][3, 5] = value
    without_weights(folder)
    write_checkpoint(folder, tensors)


@damage(NonFiniteWeightError, "model.safetensors", Q_PROJ, "NaN", "row 3")
def nan_in_a_weight(folder: Path) -> None:
    with_value(folder, np.nan)


@damage(NonFiniteWeightError, "model.safetensors", Q_PROJ, "infinity", "row 3")
def infinity_in_a_weight(folder: Path) -> None:
    with_value(folder, -np.inf)


@damage(NothingToQuantizeError, "no tensor")
def no_tensors_at_all(folder: Path) -> None:
    without_weights(folder)
    write_checkpoint(folder, {})
