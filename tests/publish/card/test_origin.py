"""Where the checkpoint comes from: its base model and its license."""

import os
import re
from pathlib import Path

import pytest

import w8a8
from tests.checkpoint.hub import local_hub
from tests.checkpoints import folder_bytes
from tests.command import cli
from tests.publish.card.reading import blocks, metadata
from w8a8.errors import UnsupportedSchemeError, UsageError, W8A8Error
from w8a8.publish.card.write import make

pytestmark = pytest.mark.slow


def test_a_folder_is_no_base_model_and_its_readme_says_the_license(source: Path, out: Path) -> None:
    (source / "README.md").write_text("---\nlicense: gemma\nlicense_link: TERMS.md\n---\n# Llama\n")
    card = make(out, base_model=str(source))
    data = metadata(card.text)
    assert data["license"] == "gemma"
    assert "license_link" not in data  # that file did not come along
    assert "base_model" not in data
    assert any("no base_model" in notice for notice in card.notices)


def test_license_files_that_came_along_are_named(source: Path) -> None:
    (source / "LICENSE").write_text("All rights reserved.")
    out = source.with_name("licensed")
    w8a8.quantize(source, out)
    text = make(out).text
    data = metadata(text)
    assert (data["license"], data["license_link"]) == ("other", "LICENSE")
    assert "[LICENSE](LICENSE)" in text


def test_no_license_is_invented(out: Path) -> None:
    card = make(out)
    assert "license" not in metadata(card.text)
    assert any("no license" in notice for notice in card.notices)


def test_from_the_hub_it_has_base_model_revision_and_license(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    readme = b"---\nlicense: other\nlicense_name: terms\nlicense_link: TERMS\n---\n# Llama\n"
    with local_hub({"org/llama": {**folder_bytes(source), "README.md": readme}}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        assert cli("quantize", "org/llama", tmp_path / "out", "--cache", env=env).returncode == 0
        asked = len(hub.requests)
        run = cli("card", tmp_path / "out", env=env)
        assert run.returncode == 0, run.stderr
        assert len(hub.requests) == asked  # the cache has it
    text = (tmp_path / "out" / "README.md").read_text()
    data = metadata(text)
    assert data["base_model"] == "org/llama"
    assert (data["license"], data["license_name"]) == ("other", "terms")
    assert data["license_link"] == "https://huggingface.co/org/llama/blob/main/TERMS"
    [commands] = [b for b in blocks(text) if b.startswith("w8a8 quantize")]
    assert re.match(r"w8a8 quantize org/llama@[0-9a-f]{40} out\n", commands)


@pytest.mark.parametrize("base", ["not a name", "a/b/c", "../up"])
def test_what_is_neither_folder_nor_id_is_no_base_model(out: Path, base: str) -> None:
    with pytest.raises(UsageError, match="--base-model"):
        make(out, base_model=base)


def test_only_what_quantize_made_gets_a_card(source: Path, out: Path) -> None:
    with pytest.raises(UnsupportedSchemeError):
        make(source)
    (out / "w8a8.json").unlink()
    with pytest.raises(W8A8Error, match=r"w8a8\.json"):
        make(out)
