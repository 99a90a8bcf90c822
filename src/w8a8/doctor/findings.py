"""What follows from the facts: sentences about the machine, what each command uses of it, what would be faster."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w8a8.doctor.facts import Facts
from w8a8.execute.workers import worker_count
from w8a8.machine import Gpu, gigabytes
from w8a8.serve import int8_kernel
from w8a8.serve.installed import Installed, usable
from w8a8.serve.vllm import Options, command, given
from w8a8.terminal.wording import first_few, plural
from w8a8.vllm_plugin.rule import cutlass_fails

X86 = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx_vnni", "avx512_vnni"},
    "AMX": {"amx_int8"},
    "BF16 arithmetic": {"avx512_bf16", "amx_bf16"},
}
ARM = {"sdot": {"asimddp"}, "smmla": {"i8mm"}, "BF16 arithmetic": {"bf16"}}
"""What matters of a processor, and the features of which one is enough for it."""

STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""The package that opens each kind of object store."""


@dataclass(frozen=True, slots=True)
class Line:
    """One sentence, and what it is about."""

    about: str
    text: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What would be faster, and the command that installs it."""

    why: str
    command: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that `w8a8 doctor` says, and the facts that it follows from."""

    facts: Facts
    has: Sequence[Line]
    uses: Sequence[Line]
    faster: Sequence[Advice]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; memory in bytes, its speed in bytes a second."""
        facts = asdict(self.facts)
        facts["cpu"]["features"] = sorted(self.facts.cpu.features)
        sections = {"has": self.has, "uses": self.uses}
        return {
            "facts": facts,
            **{name: {line.about: line.text for line in lines} for name, lines in sections.items()},
            "faster": [asdict(advice) for advice in self.faster],
        }


def diagnose(facts: Facts) -> Diagnosis:
    """Say what follows from the facts; pure."""
    return Diagnosis(facts, tuple(_has(facts)), tuple(_uses(facts)), tuple(_faster(facts)))


def _has(facts: Facts) -> Iterator[Line]:
    cpu, packages = facts.cpu, facts.packages
    kinds = X86 if cpu.is_x86 else ARM
    have = [kind for kind, features in kinds.items() if features & cpu.features]
    lack = [kind for kind in kinds if kind not in have]
    abilities = [f"with {_listed(have)}"] * bool(have) + [f"without {_listed(lack)}"] * bool(lack)
    yield Line("processor", f"{cpu.name}, {_cores(facts)}, {', '.join(abilities)}.")
    yield Line(
        "memory",
        f"{gigabytes(facts.memory)}, {gigabytes(facts.available)} of it free, read at {facts.read / 1e9:.1f} GB/s.",
    )
    yield Line("GPUs", f"{_gpus(facts.gpus)}." if facts.gpus else "None that an engine could use.")
    yield Line("torch", _torch(facts))
    yield Line("vLLM", _vllm(facts.vllm))
    yield Line("Triton", f"{packages['triton']}." if "triton" in packages else "Not installed; only GPUs need it.")
    ray = f"{packages['ray']}." if "ray" in packages else "Not installed; for many machines: pip install 'w8a8[ray]'."
    yield Line("Ray", ray)
    yield Line("object stores", _stores(facts))


def _torch(facts: Facts) -> str:
    torch = facts.torch
    if torch is None:
        return "Not installed; to serve, chat and evaluate: pip install 'w8a8[eval]'."
    if torch.problem:
        return f"{torch.version} {torch.problem}."
    return f"{torch.version}, built for {_BUILDS[torch.built_for]}, with {plural(torch.threads, 'thread')}."


_BUILDS = {"cpu": "the CPU", "cuda": "NVIDIA's GPUs", "rocm": "AMD's GPUs", "xpu": "Intel's GPUs"}


def _vllm(found: Installed | None) -> str:
    if found is None:
        return "Neither in this Python's environment nor on PATH."
    plugin = "with" if found.plugin else "without"
    return f"{found.version}, built for {_BUILDS[found.build]}, {plugin} our plugin, in {_environment(found)}."


def _stores(facts: Facts) -> str:
    here = [name for name, package in STORES.items() if package in facts.packages]
    rest = [name for name in STORES if name not in here]
    opens = f"Opens {_addresses(here)}" if here else ""
    install = f"{'for' if here else 'For'} {_addresses(rest)}: pip install 'w8a8[{','.join(rest)}]'" if rest else ""
    return f"{'; '.join(filter(None, (opens, install)))}."


def _addresses(stores: Sequence[str]) -> str:
    return _listed([f"{store}://" for store in stores])


def _uses(facts: Facts) -> Iterator[Line]:
    yield Line("quantize, convert, verify", f"{plural(worker_count(), 'shard')} at a time, compiled loops, no GPU.")
    yield Line("serve, chat", _serving(facts))
    where = _gpus(usable(facts.torch.built_for, facts.gpus)) if facts.torch else ""
    yield Line("quantize --recipe, eval kld", _needs(facts, "eval") or f"torch on {where or 'the CPU'}.")
    yield Line("card, report", _needs(facts, "publish") or "All that they need is here.")


def _serving(facts: Facts) -> str:
    found = facts.vllm
    devices = found.devices(facts.gpus) if found else None
    if found and devices is not None:
        argv = command("CKPT", Options(), gpus=devices, context=1, int8=True)
        kernel = int8_kernel.notice(devices, found, given(argv).get("--linear-backend", "auto"))
        return f"vLLM on {_gpus(devices) or 'the CPU'}{f'; {kernel}' if kernel else ''}."
    ours = usable(facts.torch.built_for, facts.gpus) if facts.torch else ()
    by = int8_kernel.embedded(ours, triton="triton" in facts.packages, int8=True)
    return _needs(facts, "serve") or f"The embedded engine on {_gpus(ours) or 'the CPU'}; {by}."


def _faster(facts: Facts) -> Iterator[Advice]:
    found, torch, gpus = facts.vllm, facts.torch, facts.gpus
    ours = usable(torch.built_for, gpus) if torch else ()
    # 1) An engine for these GPUs.
    if usable("cuda", gpus) and not (found and found.devices(gpus)):
        yield Advice("vLLM serves many requests at once on these GPUs; give it an environment.", "pip install vllm")
    # 2) What an engine that is here lacks.
    if found and not found.plugin and any(_ours_goes_first(gpu) for gpu in found.devices(gpus) or ()):
        install = f"{_environment(found)}/bin/python -m pip install 'w8a8[vllm]'"
        yield Advice("Our INT8 kernel is the one to run on these GPUs, by our plugin for vLLM.", install)
    if torch and usable("cuda", gpus) and not ours:
        install = "pip install --upgrade --force-reinstall torch"
        yield Advice(f"torch is built for {_BUILDS[torch.built_for]} and leaves the GPUs alone.", install)
    if ours and "triton" not in facts.packages:
        yield Advice("Without Triton the embedded engine has no INT8 kernel for the GPUs.", "pip install triton")
    # 3) What holds threads back.
    if torch and 0 < torch.threads < facts.cpu.cores and "OMP_NUM_THREADS" in facts.environment:
        why = f"OMP_NUM_THREADS keeps torch to {plural(torch.threads, 'thread')} on {_cores(facts)}."
        yield Advice(why, "unset OMP_NUM_THREADS")


def _ours_goes_first(gpu: Gpu) -> bool:
    return gpu.is_rdna or cutlass_fails(gpu.arch)


def _needs(facts: Facts, extra: str) -> str:
    """Say what is missing for a command, and the command that installs it; empty where nothing is."""
    unmet = facts.unmet[extra]
    if facts.torch and facts.torch.problem and extra in ("serve", "eval"):
        return f"Not yet: torch {facts.torch.problem}."
    return f"Not yet, for want of {first_few(unmet)}: pip install 'w8a8[{extra}]'." if unmet else ""


def _environment(found: Installed) -> Path:
    """The folder of the environment whose `bin` has this vLLM's program."""
    return Path(found.program[0]).parent.parent


def _gpus(gpus: Sequence[Gpu]) -> str:
    counted = Counter(f"{gpu.name} ({', '.join(filter(None, (gpu.arch, gigabytes(gpu.memory))))})" for gpu in gpus)
    return _listed([f"{number} x {name}" for name, number in counted.items()])


def _cores(facts: Facts) -> str:
    return plural(facts.cpu.cores, "core")


def _listed(names: Sequence[str]) -> str:
    """Join names as a sentence does: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
