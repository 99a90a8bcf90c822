"""A machine for Bochs, an emulator of whole x86 PCs: a ROM that starts a program, which has all of the processor.

Bochs has instructions that this machine may lack. There is no operating system: the ROM brings the processor into
64-bit mode, allows every vector register that it has, and jumps to the program. What that writes goes to Bochs' output.
"""

import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

BOCHS, ASSEMBLER, LINKER = "bochs", "as", "ld"

_PROGRAM, _ROM = 0x100000, 0xFFFF0000
"""Where the program lies in memory, and the ROM, which ends where memory ends."""

_BLOCK, _BLOCKS = 0x20000, 4
"""Bochs keeps memory in blocks of 128 KiB, and loads a file into a block: there may be four files."""

_SECONDS = 120

_BOOT = f"""
.text
rom: .org 0xfe00
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
table: .word 31
.long gdt
.code16
real: cli
lgdtl %cs:table-rom
movl %cr0, %eax
orl $1, %eax
movl %eax, %cr0
ljmpl $8, $protected
.code32
protected: movw $16, %ax
movw %ax, %ds
movw %ax, %es
movw %ax, %ss
movl $0x2003, 0x1000
movl $0x3003, 0x2000
movl $0x4003, 0x2018
movl $0x00000083, 0x3000
movl $0xffe00083, 0x4ff8
movl $0x1000, %eax
movl %eax, %cr3
movl $0x40620, %eax
movl %eax, %cr4
movl $0xc0000080, %ecx
rdmsr
orl $0x100, %eax
wrmsr
movl $0x80000033, %eax
movl %eax, %cr0
movl $13, %eax
xorl %ecx, %ecx
cpuid
xorl %ecx, %ecx
xorl %edx, %edx
xsetbv
ljmpl $24, $long
.code64
long: movl $0x90000, %esp
movl ${_PROGRAM}, %eax
jmpq *%rax
.org 0xfff0
.code16
jmp real
.org 0x10000
"""
"""From the reset, in real mode, by a page table of the first 2 MiB and the last, to 64-bit mode, and all of XCR0."""

_START = """
.globl memcpy, memset
call run_trials
movq %rax, %rsi
movl ${size}, %ecx
movl $0xe9, %edx
rep outsb
movl $name, %esi
movl $8, %ecx
movl $0x8900, %edx
rep outsb
0: hlt
jmp 0b
name: .ascii "Shutdown"
memcpy: movq %rdi, %rax
movq %rdx, %rcx
rep movsb
ret
memset: movq %rdi, %r8
movl %esi, %eax
movq %rdx, %rcx
rep stosb
movq %r8, %rax
ret
"""
"""Runs the trials, writes the memory to port E9, which is Bochs' output, and a word that ends Bochs to another."""

_SETTINGS = """
config_interface: textconfig
display_library: rfb, options="timeout=0"
cpu: model={model}, reset_on_triple_fault=0
megs: 32
romimage: file={folder}/rom, address=0xffff0000
vgaromimage: file={folder}/rom
ata0: enabled=0
ata1: enabled=0
port_e9_hack: enabled=1
log: {folder}/log
panic: action=fatal
"""


@cache
def models() -> frozenset[str]:
    """Return the processors that the installed Bochs knows; none where there is no Bochs."""
    try:
        run = subprocess.run([BOCHS, "--help", "cpu"], capture_output=True, text=True, check=False, timeout=_SECONDS)
    except FileNotFoundError:
        return frozenset()
    return frozenset(re.findall(r"^ *(\w+)", run.stdout + run.stderr, re.MULTILINE))


def run(trials: Path, size: int, model: str, folder: Path) -> bytes:
    """Run trials of `tile_programs.compiled` on the processor that Bochs calls `model`; return Bochs' output."""
    _linked(_START.format(size=size), [trials], _PROGRAM, folder / "program")
    _linked(_BOOT, [], _ROM, folder / "rom")
    rom = bytearray((folder / "rom").read_bytes())
    rom[0] = -sum(rom) % 256  # Bochs checks that a ROM's bytes add up to 0
    (folder / "rom").write_bytes(rom)
    program, lines = (folder / "program").read_bytes(), _SETTINGS.format(model=model, folder=folder)
    if len(program) > _BLOCK * _BLOCKS:
        raise ValueError(f"a program of {len(program)} bytes: Bochs loads at most {_BLOCK * _BLOCKS}")
    for i in range(-(-len(program) // _BLOCK)):
        block = folder / f"block{i + 1}"
        block.write_bytes(program[i * _BLOCK :][:_BLOCK])
        lines += f"optramimage{i + 1}: file={block}, address={_PROGRAM + i * _BLOCK:#x}\n"
    settings = folder / "settings"
    settings.write_text(lines)
    command = [BOCHS, "-q", "-f", str(settings)]
    go_on = b"c\n"  # to Bochs' debugger, where that is built in
    return subprocess.run(command, capture_output=True, check=False, input=go_on, timeout=_SECONDS).stdout


def _linked(text: str, objects: Sequence[Path], address: int, path: Path) -> None:
    """Assemble `text`, and link it and what follows into the bytes that have to lie at `address`."""
    first = path.with_suffix(".o")
    subprocess.run([ASSEMBLER, "--64", "-o", first], input=text.encode(), check=True)
    command: list[str | Path] = [LINKER, "-m", "elf_x86_64", f"-Ttext={address:#x}", "-e", hex(address)]
    subprocess.run([*command, "--oformat", "binary", "-o", path, first, *objects], check=True)
