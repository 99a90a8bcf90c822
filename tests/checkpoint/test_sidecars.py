import json
from pathlib import Path

import pytest

from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.sidecars import sort_files
from w8a8.errors import PathEscapeError

TRAVEL = [
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json", "chat_template.jinja", "config.json",
    "generation_config.json", "merges.txt", "modeling_custom.py", "preprocessor_config.json", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.mm.model.v11", "tokenizer.model", "tokenizer.model.v3",
    "tokenizer.model.v7m1", "tokenizer_config.json", "vocab.txt",
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


MODULES = ["", "1_Pooling", "2_Dense/", "3_Normalize", "../outside", "/etc", "4_Link", ".", "old.safetensors"]


def test_the_layers_behind_a_sentence_transformer_travel(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(tmp_path, "outside/", "outside/config.json")
    make(folder, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/.cache")
    make(folder, "2_Dense/pytorch_model.bin", "3_Normalize/", "9_Other/config.json", "config.json", "modules.json")
    make(folder, "old.safetensors")
    (folder / "2_Dense" / "deep").symlink_to(folder)
    (folder / "4_Link").symlink_to("4_Link")
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "path": path} for i, path in enumerate(MODULES)]))

    sidecars, left_out = sort_files(folder, set())

    assert sidecars == (
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("config.json", "modules.json"),
    )
    assert {left.name for left in left_out} == {
        *("2_Dense/deep", "2_Dense/pytorch_model.bin", "4_Link", "9_Other/", "old.safetensors")
    }


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"path": ["1_Pooling"]}]', '[{"path": null}]', "[" * 9999])
def test_modules_that_say_nothing_name_no_folder(tmp_path: Path, text: str) -> None:
    make(tmp_path, "1_Pooling/config.json", "modules.json")
    (tmp_path / "modules.json").write_text(text)

    assert [left.name for left in sort_files(tmp_path, set())[1]] == ["1_Pooling/"]


def test_a_module_that_links_out_of_the_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    make(tmp_path, "secret/config.json")
    (llama / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (llama / "1_Pooling").symlink_to(tmp_path / "secret")

    with pytest.raises(PathEscapeError, match="1_Pooling"):
        Checkpoint.open(llama)


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
