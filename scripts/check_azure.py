"""From a container on Azure Blob Storage to one, on Azurite: python scripts/check_azure.py

Needs Node.js (npx fetches Azurite) and `pip install 'w8a8[az]'`. The test suite has S3 and Google's store, whose
servers are Python packages; Azurite is none, so this is run by hand.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from socket import create_connection, socket

import numpy as np
from safetensors.numpy import save_file

from w8a8 import inspect, quantize
from w8a8.errors import TargetExistsError

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""That of Azurite's own account, as its documentation has it."""
CONFIG = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'


def main() -> None:
    """Start Azurite, check, and end it."""
    with tempfile.TemporaryDirectory() as home, socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        os.chdir(home)
        command = ["npx", "--yes", "--package", "azurite@3", "azurite-blob", "--silent"]
        command += ["--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port), "--location", "azurite"]
        azurite = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            check(port)
        finally:
            os.killpg(azurite.pid, signal.SIGTERM)  # npx has it in a process of its own
            azurite.wait()
    print("az:// to az://: the same bytes as from a folder to a folder")


def check(port: int) -> None:
    """Quantize from Azurite to Azurite, and compare with folders here."""
    from adlfs import AzureBlobFileSystem

    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    account = f"AccountName=devstoreaccount1;AccountKey={KEY};BlobEndpoint={endpoint};"
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = f"DefaultEndpointsProtocol=http;{account}"
    wait_for(port)
    system = AzureBlobFileSystem(connection_string=os.environ["AZURE_STORAGE_CONNECTION_STRING"])
    system.mkdir("models")
    folder = small_llama(Path("llama"))
    for path in folder.iterdir():
        system.pipe_file(f"models/some/llama/{path.name}", path.read_bytes())
    assert inspect("az://models/some/llama").name == "llama"
    quantize("az://models/some/llama", "az://models/out")
    quantize(folder, "whole", hash_source=True)
    found = {key.removeprefix("models/out/"): system.cat_file(key) for key in system.find("models/out")}
    assert found == {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    try:
        quantize(folder, "az://models/out")
    except TargetExistsError:
        return
    raise AssertionError("a result was replaced")


def wait_for(port: int) -> None:
    """Wait until somebody listens; npx may have to fetch Azurite first."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit("Azurite does not answer")


def small_llama(folder: Path) -> Path:
    """Two shards of 16 MB each, so that the result goes by blocks."""
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    random, index = np.random.default_rng(0), {}
    for i in (1, 2):
        name, shard = f"model.layers.{i}.mlp.down_proj.weight", f"model-0000{i}-of-00002.safetensors"
        save_file({name: random.standard_normal((2048, 4096)).astype(np.float16)}, folder / shard)
        index[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


if __name__ == "__main__":
    main()
