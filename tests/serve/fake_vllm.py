"""Stands in for vLLM where starting and stopping is tested: a server with a worker, which ends only when killed.

Writes what it was given, and its process ids, to `$FAKE_VLLM/started.json`. `$FAKE_VLLM_MANNER` makes it `fail` before
it is ready, `fall` after its first answer, or `linger` when asked to end.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = "FAKE_VLLM"
MANNER = "FAKE_VLLM_MANNER"
WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def install(folder: Path, version: str) -> dict[str, str]:
    """Make `vllm` of that version in `folder`, without Ray; returns the environment in which it is found."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nfrom tests.serve.fake_vllm import main\nmain()\n")
    program.chmod(0o755)
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")  # as if it were not installed
    searched = (str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    return {
        "PATH": str(program.parent),
        "PYTHONPATH": os.pathsep.join(searched),
        FOLDER: str(folder),
    }


def started(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What the one installed there wrote when it was started, if it was."""
    file = Path(environment[FOLDER]) / "started.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


def main() -> None:
    """Serve until told to end."""
    manner = os.environ.get(MANNER)
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()

    if manner == "linger":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    argv = sys.argv[1:]
    values = {"argv": argv, "api_key": os.environ.get("VLLM_API_KEY"), "pids": [os.getpid(), worker.pid]}
    file = Path(os.environ[FOLDER]) / "started.json"
    file.with_suffix(".part").write_text(json.dumps(values))
    file.with_suffix(".part").rename(file)
    print("the engine speaks", flush=True)
    if manner == "fail":
        print("\x1b[31m(EngineCore pid=1)\x1b[0m ERROR 11-23 12:00:00 [core.py:1] ValueError: no room for the KV cache")
        sys.exit("RuntimeError: Engine core initialization failed")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})
            if manner == "fall":
                os._exit(3)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer({"path": self.path, "key": self.headers["Authorization"], **request})

        def _answer(self, value: object) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

    flags = dict(pairwise(argv))
    ThreadingHTTPServer((flags["--host"], int(flags.get("--port", "8000"))), Handler).serve_forever()
