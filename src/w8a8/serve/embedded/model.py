"""The one model that the embedded engine serves."""

import logging
import time
from pathlib import Path
from typing import Any

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

from w8a8.errors import EngineError, first_line
from w8a8.runtime.loading import engine_errors, load_model, load_processor, load_tokenizer
from w8a8.runtime.norms import in_one_call
from w8a8.runtime.unquantized import widen

DEFAULT_CONTEXT = 8192


class OneModel:
    """A model with its processor, loaded for good.

    Its unquantized layers compute as `runtime.unquantized` says, its norms as `runtime.norms` does.
    """

    def __init__(self, name: str, folder: Path, max_model_len: int | None, dtype: str = "auto") -> None:
        """Load the model to compute in `dtype` ("auto": as stored). Raises EngineError, or the checkpoint's error."""
        self.name = name
        self.created = int(time.time())
        self.processor = _processor(name, folder)
        with engine_errors(f"{name}: this server cannot run it"):
            self.tokenizer = getattr(self.processor, "tokenizer", self.processor)._tokenizer
            check_decoder(self.tokenizer)
        self.model = in_one_call(widen(load_model(name, folder, dtype)))
        text = self.model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT
        self.context = min(limit, max_model_len or DEFAULT_CONTEXT)
        with engine_errors(f"{name}: this server cannot run it"):
            self.sees = ModelManager.get_model_modality(self.model, self.processor) is not Modality.LLM

    @property
    def entry(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "w8a8"}
        return {**entry, "root": self.name, "max_model_len": self.context}


def check_decoder(tokenizer: Any) -> None:
    """Raise ValueError for a `tokenizer` that puts text together by patterns: these may run for ever.

    No published one does. Unlike a prompt, an answer has no process that could be ended.
    """
    if tokenizer.decoder is not None and b'{"Regex":' in tokenizer.decoder.__getstate__():
        raise ValueError("its tokenizer's decoder holds a regular expression, which may run for ever")


def _processor(name: str, folder: Path) -> Any:
    """Load the processor or, where it cannot be had (no torchvision), the tokenizer, which still answers text."""
    try:
        return load_processor(name, folder)
    except EngineError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        log = logging.getLogger("uvicorn.error")
        log.warning("no images: the processor cannot be loaded (%s)", first_line(error.__cause__))
        return load_tokenizer(name, folder)
