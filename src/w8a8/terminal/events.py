"""What happens, as lines of JSON on standard error, where `--log-json` asks for it; docs/large.md has the schema."""

import json
import sys
from datetime import UTC, datetime
from typing import Any

OPTION = "--log-json"


def logged() -> bool:
    """Whether the command line asks for it: errors that end a command have no other way to know."""
    return OPTION in sys.argv


def event(kind: str, **values: Any) -> None:
    """Write one event: its time (UTC, ISO 8601), its `kind`, and `values` of plain JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    sys.stderr.write(json.dumps({"time": now, "event": kind, **values}) + "\n")
    sys.stderr.flush()
