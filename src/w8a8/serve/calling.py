"""How to call a server that speaks OpenAI's API: its address, and a line to paste."""

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.checkpoint.source import cached, hub_id
from w8a8.errors import UnreadableError
from w8a8.reading import UnfitError, read_json

_EVERYWHERE = {"127.0.0.1": "localhost", "0.0.0.0": "localhost", "::": "localhost"}


@dataclass(frozen=True, slots=True)
class Call:
    """A server's address, the model it serves, whether it can chat, and how its API key is written (never the key)."""

    host: str
    port: int
    model: str
    chat: bool
    key: str = ""

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host = _EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    @property
    def curl(self) -> str:
        """A request, as typed in a shell."""
        asked = {"messages": [{"role": "user", "content": "Hello!"}]} if self.chat else {"prompt": "Once upon a time"}
        body = json.dumps({"model": self.model, **asked, "max_tokens": 64})
        lines = [
            f"curl {self.url}/{'chat/completions' if self.chat else 'completions'}",
            '-H "Content-Type: application/json"',
            *([f'-H "Authorization: Bearer {self.key}"'] if self.key else []),
            f"-d {shlex.quote(body)}",
        ]
        return " \\\n  ".join(lines)

    @property
    def python(self) -> str:
        """The same server for the openai package."""
        key = f'os.environ["{self.key[1:]}"]' if self.key.startswith("$") else f'"{self.key or "none"}"'
        return f'OpenAI(base_url="{self.url}", api_key={key})'


def can_chat(checkpoint: str) -> bool:
    """Say whether a folder's or Hub id's tokenizer or processor has a chat template; without such files it may."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = cached(*hub_id(checkpoint)) or folder
    if (folder / "chat_template.jinja").is_file():
        return True
    known = False
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        with suppress(UnreadableError, UnfitError):
            if read_json(folder / name, dict[str, Any]).get("chat_template"):
                return True
            known = True
    return not known
