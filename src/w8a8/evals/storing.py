"""Writes a result file: whole or not at all."""

import json
from pathlib import Path
from typing import Any

from w8a8.errors import UnwritableError


def store(result: dict[str, Any], path: Path) -> None:
    """Write `result` as JSON; what stood there before stays until the new one is whole. Raises `UnwritableError`."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UnwritableError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
