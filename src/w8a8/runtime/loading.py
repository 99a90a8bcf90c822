"""Load a checkpoint with transformers: its config, its class, its tokenizer, the whole model.

Every loading by transformers is here, and code that comes with a checkpoint is never run: the class is one of
transformers' own, or there is an error that says who may run it. A tokenizer's files are loaded within bounds of size.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers

from w8a8.errors import EngineError, UnreadableError, W8A8Error, first_line
from w8a8.reading import UnfitError, read_bytes, read_json

CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""The files of a checkpoint in which `auto_map` may name code."""

TABLES = ("*.json", "*.txt", "*.model", "*.jinja")
"""The files that a tokenizer or a processor is made of."""

MAX_TABLE_BYTES = 128_000_000
"""The largest published ones, a tokenizer.json of 262,144 tokens with its merges, have 34 million."""

OF_ADDED_TOKENS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_ADDED_TOKENS = 200_000
"""Models of speech add 65,536 tokens to a text model's; published language models have some thousand."""


def load_config(name: str, folder: Path) -> Any:
    """Read the config of the checkpoint in `folder`. Raises EngineError."""
    with _loading(name, folder, "its config cannot be read"):
        return _config(folder)


def load_tokenizer(name: str, folder: Path) -> Any:
    """Load the tokenizer of the checkpoint in `folder`. Raises EngineError."""
    with _loading(name, folder, "its tokenizer cannot be loaded"):
        _check_tables(folder)
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_processor(name: str, folder: Path) -> Any:
    """Load the processor of the checkpoint in `folder`, or the tokenizer where it has no other. Raises EngineError."""
    with _loading(name, folder, "its processor cannot be loaded"):
        _check_tables(folder)
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def load_model(name: str, folder: Path, dtype: str = "auto") -> Any:
    """Load the whole model onto the devices there are, in evaluation mode, to compute in `dtype` ("auto": as stored).

    Raises EngineError, or the checkpoint's own error.
    """
    quiet()
    with _loading(name, folder, "transformers cannot load it"):
        config = _config(folder)
        kind = model_class(name, config)
        return kind.from_pretrained(
            folder, config=config, dtype=dtype, device_map="auto", trust_remote_code=False
        ).eval()


def model_class(name: str, config: Any) -> Any:
    """Return the class of transformers that `config` names as its architecture. Raises EngineError if there is none."""
    architecture = (config.architectures or ["none"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise EngineError(f"{name}: transformers {transformers.__version__} has no architecture {architecture}")
    return kind


def quiet() -> None:
    """Let transformers say errors alone, and draw its progress bar only in a terminal."""
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def _check_tables(folder: Path) -> None:
    """Raise UnfitError for files of a tokenizer that are larger, or add more tokens, than any published one."""
    for path in (path for kind in TABLES for path in folder.glob(kind)):
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise UnfitError(f"{path.name} is larger than {MAX_TABLE_BYTES:,} bytes")
    for path in (folder / name for name in OF_ADDED_TOKENS):
        # An added token is an object, or a name with its number; braces and colons in strings are few.
        mark = b":" if path.name == "added_tokens.json" else b"{"
        if path.is_file() and read_bytes(path, MAX_TABLE_BYTES).count(mark) > MAX_ADDED_TOKENS:
            raise UnfitError(f"{path.name} adds more than {MAX_ADDED_TOKENS:,} tokens")


def _config(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, config.get_text_config(decoder=True)):
        if not getattr(part, "quantization_config", True):  # transformers takes `{}` for a scheme without a name
            del part.quantization_config
    return config


@contextmanager
def _loading(name: str, folder: Path, problem: str) -> Iterator[None]:
    """Turn whatever transformers raises into an EngineError that says so if the checkpoint brings code of its own."""
    try:
        with engine_errors(f"{name}: {problem}"):
            yield
    except EngineError as error:
        if not (names := _with_code(folder)):
            raise
        raise EngineError(
            f"{error}. {', '.join(names)} name code that comes with the checkpoint, which this tool never runs; where "
            "you trust it, vLLM does: w8a8 serve --engine vllm --trust-remote-code"
        ) from error.__cause__


def _with_code(folder: Path) -> list[str]:
    """Find the files that map classes to code of the checkpoint's own."""
    found = []
    for name in CONFIGS:
        with suppress(UnreadableError, UnfitError):
            if read_json(folder / name, dict[str, Any]).get("auto_map"):
                found.append(name)
    return found


@contextmanager
def engine_errors(problem: str) -> Iterator[None]:
    """Turn whatever transformers raises into an EngineError: the `problem`, and the first line of the reason."""
    try:
        yield
    except W8A8Error:
        raise
    except Exception as error:
        raise EngineError(f"{problem}: {first_line(error)}") from error
