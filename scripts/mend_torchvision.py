"""Make torchvision importable beside a torch of another build: `.venv/bin/python scripts/mend_torchvision.py`.

torchvision's Python parts, which image processors use, work with any torch, but on import they register fakes for
operators that only its binary defines; where that binary does not load (the CUDA build beside a CPU torch, the only
combination some package indexes offer) the import fails. Then a hook is written into this environment that declares
those operators' names first. Where `import torchvision` works already, nothing is done.
"""

import re
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

HOOK = '''\
"""Declares torchvision's operators where its binary cannot; written by scripts/mend_torchvision.py."""

import sys

OPERATORS = {operators!r}


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            sys.torchvision_library = self.library  # or it would be undone when collected
            for operator in OPERATORS:
                self.library.define(operator + "(Tensor x) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
'''


def main() -> None:
    """Mend the environment this Python belongs to."""
    if _imports():
        return
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        sys.exit("mend_torchvision: torchvision is not installed here")
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    operators = {
        *re.findall(r'register_fake\("torchvision::(\w+)"', source),
        *re.findall(r'register_meta\("(\w+)"', source),
    }
    site = Path(sysconfig.get_path("purelib"))
    (site / "_declare_torchvision.py").write_text(HOOK.format(operators=sorted(operators)))
    (site / "_declare_torchvision.pth").write_text("import _declare_torchvision\n")
    if not _imports():
        sys.exit("mend_torchvision: torchvision still does not import; see .venv/bin/python -c 'import torchvision'")


def _imports() -> bool:
    return (
        subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0
    )


if __name__ == "__main__":
    main()
