"""Load a checkpoint with transformers: its config, its class, its tokenizer, the whole model.

Code that comes with a checkpoint is never run: the class is one of transformers' own.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from w8a8.errors import EngineError, W8A8Error, first_line


def load_config(folder: Path) -> Any:
    """Read the config of the checkpoint in `folder`. Raises whatever transformers does."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, config.get_text_config(decoder=True)):
        if not getattr(part, "quantization_config", True):  # transformers takes `{}` for a scheme without a name
            del part.quantization_config
    return config


def load_tokenizer(name: str, folder: Path) -> Any:
    """Load the tokenizer of the checkpoint in `folder`. Raises EngineError."""
    with engine_errors(f"{name}: its tokenizer cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_model(name: str, folder: Path, dtype: str = "auto") -> Any:
    """Load the whole model onto the devices there are, in evaluation mode, to compute in `dtype` ("auto": as stored).

    Raises EngineError, or the checkpoint's own error.
    """
    quiet()
    with engine_errors(f"{name}: transformers cannot load it"):
        config = load_config(folder)
        kind = model_class(name, config)
        return kind.from_pretrained(folder, config=config, dtype=dtype, device_map="auto").eval()


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


@contextmanager
def engine_errors(problem: str) -> Iterator[None]:
    """Turn whatever transformers raises into an EngineError: the `problem`, and the first line of the reason."""
    try:
        yield
    except W8A8Error:
        raise
    except Exception as error:
        raise EngineError(f"{problem}: {first_line(error)}") from error
