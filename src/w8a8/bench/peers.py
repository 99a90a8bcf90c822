"""The tools that this one is compared with, each in its own virtual environment, called as its users call it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from w8a8.bench.environment import TORCH, built

_QUARK = """
import sys
from quark.torch import ModelQuantizer
from quark.torch.quantization.config.config import QConfig, QLayerConfig, QTensorConfig
from quark.torch.quantization.config.type import Dtype, QSchemeType, RoundType, ScaleType
from quark.torch.quantization.observer.observer import PerChannelMinMaxObserver

def spec(ch_axis, is_dynamic):
    return QTensorConfig(dtype=Dtype.int8, qscheme=QSchemeType.per_channel, observer_cls=PerChannelMinMaxObserver,
                         symmetric=True, scale_type=ScaleType.float, round_method=RoundType.half_even,
                         ch_axis=ch_axis, is_dynamic=is_dynamic)

if __name__ == "__main__":
    layer = QLayerConfig(weight=spec(0, False), input_tensors=spec(1, True))
    exclude = ["*lm_head*", "*embed_tokens*", "*vision_tower*", "*embed_vision*"]
    quantizer = ModelQuantizer(QConfig(global_quant_config=layer, exclude=exclude))
    quantizer.direct_quantize_checkpoint(pretrained_model_path=sys.argv[1], save_path=sys.argv[2], device="cpu")
"""

_LLM_COMPRESSOR = """
import sys
from llmcompressor import model_free_ptq

if __name__ == "__main__":
    model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="W8A8", device="cpu",
                   ignore=["re:.*lm_head", "re:.*embed_tokens.*", "re:.*vision_tower.*", "re:.*embed_vision.*"])
"""

_ONESHOT = """
import sys
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

GEMMA = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"],
]

if __name__ == "__main__":
    source, out, calibration, samples, tokens = sys.argv[1:]
    data = load_dataset("json", data_files=calibration, split="train")
    gptq = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    oneshot(model=source, dataset=data, recipe=[*STEPS, gptq], output_dir=out, concatenate_data=True,
            max_seq_length=int(tokens), num_calibration_samples=int(samples))
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool: its packages, and a script with the arguments SRC and OUT; `key` names its environment's folder."""

    key: str
    name: str
    packages: tuple[str, ...]
    script: str

    def command(self, folder: Path, source: Path, out: Path) -> Sequence[str]:
        """Return the command that quantizes `source` into `out`, after building the tool's environment if needed.

        Raises W8A8Error with pip's reason if the environment cannot be built.
        """
        home = folder / self.key
        python = built(home, (TORCH,), (TORCH, *self.packages))
        script = home / "run.py"
        script.write_text(self.script, encoding="utf-8")
        return [str(python), str(script), str(source), str(out)]


PEERS = (
    Peer("quark", "AMD Quark 0.13", ("amd-quark==0.13", "transformers==5.23.0"), _QUARK),
    Peer("llm-compressor", "llm-compressor 0.14.0.1", ("llmcompressor==0.14.0.1",), _LLM_COMPRESSOR),
)
"""Tools that work file to file, without calibration."""


def _oneshot(name: str, steps: str) -> Peer:
    compressor = PEERS[1]
    script = _ONESHOT.replace("*STEPS, ", steps)
    return Peer(compressor.key, f"{compressor.name} {name}", compressor.packages, script)


CALIBRATED_PEERS = (
    _oneshot("GPTQ", ""),
    _oneshot("SmoothQuant, inferred mappings", "SmoothQuantModifier(smoothing_strength=0.8), "),
    _oneshot("SmoothQuant, mappings by hand", "SmoothQuantModifier(smoothing_strength=0.8, mappings=GEMMA), "),
)
"""Tools that calibrate. Their scripts take three more arguments: a JSONL file, how many samples, and tokens of each."""
