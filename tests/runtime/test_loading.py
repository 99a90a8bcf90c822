"""Code that comes with a checkpoint is never run, and nobody is asked whether to, whatever names it."""

import builtins
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import w8a8.runtime  # noqa: F401
from tests.command import cli
from tests.serve.embedded.servers import word_tokenizer
from w8a8.errors import EngineError
from w8a8.evals.kld.models import limits
from w8a8.runtime.loading import load_config, load_model, load_processor, load_tokenizer

pytestmark = pytest.mark.slow

CODE = """
from pathlib import Path
Path({ran!r}).write_text("")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProcessorMixin
class Config(LlamaConfig): model_type = "own"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
class Processor(ProcessorMixin): pass
"""
AUTO_MAP: Any = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoProcessor": "code.Processor",
    "AutoTokenizer": [None, "code.Tokenizer"],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("own") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the checkpoint's code would write; whoever asks is told yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "ran"


def bringing_code(llama: Path, folder: Path, ran: Path, name: str, **more: Any) -> Path:
    """A copy of `llama` whose file `name` points to code of its own."""
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "code.py").write_text(CODE.format(ran=str(ran)))
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, "auto_map": AUTO_MAP, **more}))
    return folder


LOADS: dict[str, Callable[[str, Path], Any]] = {
    "config": load_config,
    "tokenizer": load_tokenizer,
    "processor": load_processor,
    "model": load_model,
    "kld": limits,
}
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "config": ("config.json", {}),
    "unknown config": ("config.json", {"model_type": "own", "architectures": ["Model"]}),
    "tokenizer": ("tokenizer_config.json", {}),
    "unknown tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"}),
    "processor": ("processor_config.json", {}),
    "unknown processor": ("processor_config.json", {"processor_class": "Processor"}),
    "preprocessor": ("preprocessor_config.json", {"image_processor_type": "Own"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_loading_runs_it_or_asks(place: str, llama: Path, ran: Path, tmp_path: Path) -> None:
    name, more = PLACES[place]
    folder = bringing_code(llama, tmp_path / "model", ran, name, **more)
    errors = [error for load in LOADS.values() if (error := refusal(load, folder))]
    assert not ran.exists()
    assert all(f"{name} name" in error and "--trust-remote-code" in error for error in errors)
    assert len(errors) < len(LOADS) or place == "unknown config"
    assert errors or place in {"config", "tokenizer", "unknown tokenizer"}


def refusal(load: Callable[[str, Path], Any], folder: Path) -> str | None:
    try:
        load("it", folder)
    except EngineError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModelForCausalLM"])
def test_with_the_runtime_transformers_does_not_ask_either(kind: str, llama: Path, ran: Path, tmp_path: Path) -> None:
    folder = bringing_code(llama, tmp_path / "model", ran, "config.json", model_type="own")
    with suppress(ValueError, OSError):  # or a class of transformers' own serves
        getattr(transformers, kind).from_pretrained(folder)
    assert not ran.exists()


def test_what_needs_no_code_says_nothing_of_it(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as failed:
        load_tokenizer("it", tmp_path)
    assert "--trust-remote-code" not in str(failed.value)
    assert load_processor("it", llama)


@pytest.mark.parametrize(
    "command",
    [("chat", "MODEL", "--prompt", "Hi"), ("eval", "kld", "MODEL", "MODEL", "--text", "TEXT"),
     ("quantize", "MODEL", "OUT", "--recipe", "smooth", "--calibration", "TEXT")],
    ids=["chat", "kld", "calibrate"],
)  # fmt: skip
def test_a_yes_on_standard_input_runs_nothing(command: tuple[str, ...], llama: Path, ran: Path, tmp_path: Path) -> None:
    folder = bringing_code(llama, tmp_path / "model", ran, "config.json", model_type="own", architectures=["Model"])
    (tmp_path / "text").write_text(" w1 w2" * 2000)
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out"), "TEXT": str(tmp_path / "text")}
    done: subprocess.CompletedProcess[str] = cli(*(places.get(a, a) for a in command), stdin="y\n" * 20)
    assert not ran.exists()
    assert done.returncode in {EngineError.exit_code, 61}, done.stderr
    assert "Do you wish" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "--trust-remote-code" in done.stderr or done.returncode == 61, done.stderr


def test_importing_the_tool_alone_loads_no_transformers() -> None:
    program = "import sys, w8a8; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("load", [load_tokenizer, load_processor])
def test_a_tokenizer_larger_than_any_published_one_is_refused_before_it_is_loaded(
    load: Callable[[str, Path], Any], llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "large"))
    load("large", folder)
    whole = (folder / "tokenizer.json").read_text()
    added = {"id": 1, "content": "a", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    many = json.dumps([{**added, "special": True}] * 200_001)
    (folder / "tokenizer.json").write_text(whole.replace('"added_tokens": []', f'"added_tokens": {many}'))
    with pytest.raises(EngineError, match=r"tokenizer\.json adds more than 200,000 tokens"):
        load("large", folder)
    (folder / "tokenizer.json").write_text(whole)
    with (folder / "vocab.txt").open("wb") as file:
        file.truncate(128_000_001)
    with pytest.raises(EngineError, match=r"vocab\.txt is larger than 128,000,000 bytes"):
        load("large", folder)
