"""Says what a folder holds that is no checkpoint to quantize, by its files' names: another format, or a part."""

import re
from collections.abc import Iterable

_ORIGINAL = "give the safetensors checkpoint that it was made from"
_KINDS = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"adapter_config\.json|adapter_model\..+",
            "this is a LoRA adapter; merge it into its base model first (in peft: merge_and_unload, save_pretrained)",
        ),
        (
            r"model_index\.json",
            "this is a diffusers pipeline, whose models lie in its subfolders; w8a8 quantizes language models",
        ),
        (r"(?i).*\.gguf", "{} is GGUF: download it (`hf download REPOSITORY FILE --local-dir .`) and give its path"),
        (r"(?i).*\.(ggml|llamafile)", f"{{}} is an older or a wrapped form of GGUF, llama.cpp's format; {_ORIGINAL}"),
        (r"(?i)(onnx/)?.*\.onnx(_data)?", f"{{}} is an ONNX model; {_ORIGINAL}"),
        (
            r"params\.json|consolidated\..+",
            "{} is Mistral's or Meta's own format; use the repository's transformers files",
        ),
        (r"(?i).*\.npz", f"{{}} is MLX's or NumPy's format; {_ORIGINAL}"),
        (r"(?i).*\.nemo", f"{{}} is NeMo's format; {_ORIGINAL}"),
        (r"(?i).*\.(tflite|litertlm|mlmodel|engine|pte)", f"{{}} is compiled for one runtime; {_ORIGINAL}"),
        (
            r"(?i).*\.(h5|msgpack|ot)",
            "{} holds TensorFlow, Flax or Rust weights; convert them with transformers: "
            "from_pretrained(..., from_tf=True or from_flax=True).save_pretrained(NEW_FOLDER)",
        ),
        (
            r"modules\.json|config_sentence_transformers\.json",
            "this is a sentence-transformers model; its transformer may lie in the first folder of modules.json",
        ),
    )
)  # fmt: skip


def instead(names: Iterable[str]) -> str:
    """End a sentence on files called `names` that are no checkpoint: what they are, and what to do, if it is known."""
    files = sorted(names)
    for pattern, text in _KINDS:
        if found := next(filter(pattern.fullmatch, files), None):
            return f"; {text.format(found)}"
    return ""
