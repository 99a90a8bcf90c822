"""Whether a recipe takes an architecture: its tiny model is calibrated, and the result verified."""

from pathlib import Path

import w8a8
from tests.calibrate.checkpoints import write_text, write_tokenizer
from tests.support import tiny
from tests.support.check import reason
from w8a8.errors import W8A8Error
from w8a8.quantization import Options

YES = "yes"


def calibrated(model_type: str, folder: Path) -> str:
    """Calibrate the tiny model in `folder`, which is made if it is not there; return "yes", or why that failed."""
    source, out = folder / "source", folder / "calibrated"
    try:
        if not source.is_dir():
            tiny.make_model(model_type).save_pretrained(source)
        write_tokenizer(source)
        text = str(write_text(folder))
        w8a8.quantize(source, out, Options(recipe="smooth+gptq", calibration=text, samples=2, tokens=16))
        problems = w8a8.verify(out, source).problems
    except W8A8Error as error:
        return reason(str(error), folder)
    except Exception as error:  # noqa: BLE001 - whatever fails is the answer
        return reason(f"{type(error).__name__}: {error}", folder)
    return problems[0] if problems else YES
