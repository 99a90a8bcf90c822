from pathlib import Path

import pytest

from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.sidecars import sort_files

TRAVEL = [
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json", "chat_template.jinja", "config.json",
    "generation_config.json", "merges.txt", "modeling_custom.py", "preprocessor_config.json", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt",
]  # fmt: skip
STAY = {
    "README.md": "describes the source",
    "consolidated.safetensors": "duplicate",
    "flax_model.msgpack": "other weights",
    "model-Q4_K_M.gguf": "other weight format",
    "model.onnx": "other weight format",
    "optimizer.pt": "other weights",
    "original/": "not needed",
    "params.json": "consolidated",
    "photo.png": "not needed",
    "pytorch_model.bin": "other weights",
    "pytorch_model.bin.index.json": "other weights",
    "tokenizer.json/": "not needed",
    "weights.pkl": "other weights",
}


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text("{}")


def test_what_loading_or_passing_on_the_model_needs_travels(tmp_path: Path) -> None:
    make(tmp_path, *TRAVEL)

    assert sort_files(tmp_path, set()) == (tuple(TRAVEL), ())


@pytest.mark.parametrize("name", STAY)
def test_everything_else_stays_behind_with_the_reason(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)

    sidecars, [left] = sort_files(tmp_path, set())

    assert sidecars == ()
    assert left.name == name
    assert STAY[name] in left.reason


def test_weights_and_hidden_files_are_neither(tmp_path: Path) -> None:
    make(tmp_path, ".gitattributes", ".cache/", "model.safetensors")

    assert sort_files(tmp_path, {"model.safetensors"}) == ((), ())


def test_chat_templates_in_their_folder_travel(tmp_path: Path) -> None:
    make(tmp_path, "additional_chat_templates/tool.jinja", "additional_chat_templates/notes.md")

    sidecars, [left] = sort_files(tmp_path, set())

    assert sidecars == ("additional_chat_templates/tool.jinja",)
    assert left.name == "additional_chat_templates/notes.md"


def test_an_opened_checkpoint_accounts_for_every_file(llama: Path) -> None:
    make(llama, "tokenizer.json", "README.md", "original/")

    checkpoint = Checkpoint.open(llama)

    weights = {shard.name for shard in checkpoint.shards} | {"model.safetensors.index.json"}
    left = {left.name.rstrip("/") for left in checkpoint.left_out}
    assert {*weights, *checkpoint.sidecars, *left} == {file.name for file in llama.iterdir()}


def test_a_sidecar_that_links_within_the_folder_travels(llama: Path) -> None:
    make(llama, "vocab.json")
    (llama / "tokenizer.json").symlink_to("vocab.json")

    assert {"tokenizer.json", "vocab.json"} <= set(Checkpoint.open(llama).sidecars)
