"""AMD's machine code: instructions out of the assembly that Triton gives, and what each one uses.

Pipes: ROCm Compute Profiler documentation, "Pipeline descriptions"; shapes and rates: CDNA 3 instruction set guide.
"""

import re

from .instructions import MATRIX, OTHER, Instruction, Use

LANES = 64
LINE = re.compile(r"^\t(?P<text>(?P<name>(?:[vs]_|global_|buffer_|ds_|flat_|scratch_)\w+)(?P<operands>[^;]*))")
LABEL = re.compile(r"^(\.LBB\w+):")
SOURCE = re.compile(r"^\t\.loc\s.*; (?:[^ ]*/)?([^ /:]+):(\d+):")
SHAPE = re.compile(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?(\w+)")
TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
KINDS = {"bf16": "16-bit", "f16": "16-bit", "xf32": "tf32", "f32": "float32", "f64": "float64", "i8": "int8"}


def parse(code: str) -> list[Instruction]:
    """The instructions of the one kernel in the assembly, and their source lines."""
    found: list[Instruction] = []
    labels: list[str] = []
    source = ""
    for line in code.split(".Lfunc_end0")[0].splitlines():
        if label := LABEL.match(line):
            labels.append(label.group(1))
        elif place := SOURCE.match(line):
            source = ":".join(place.groups())
        elif match := LINE.match(line):
            name, operands = match["name"], match["operands"].strip()
            jump = operands if re.match(r"s_c?branch", name) else ""
            ends = re.match(r"s_(branch|endpgm|setpc)", name) is not None
            text = " ".join(match["text"].split())
            found.append(Instruction(name, text, use_of(name, operands), tuple(labels), jump, ends, source))
            labels = []
    return found


def use_of(name: str, operands: str = "") -> Use:
    """What an instruction uses."""
    if shape := SHAPE.match(name):
        m, n, k, blocks, operand = shape.groups()
        return Use(MATRIX, flops=2 * int(m) * int(n) * int(k) * int(blocks or 1), kind=_kind(operand))
    if name.startswith(("global_", "buffer_", "flat_", "scratch_")):
        return _memory_use(name)
    if name.startswith("ds_"):
        return Use("lds", "lds", _local_bytes(name) * LANES)
    if name.startswith("v_"):
        return Use("transcendental" if TRANSCENDENTAL.match(name) else "vector")
    if re.match(r"s_(waitcnt|nop|barrier|c?branch|endpgm|sleep|setprio|sched)", name):
        return Use(OTHER)
    return Use("scalar")


def access_bytes(name: str) -> int:
    """global_load_dwordx4 moves four 32-bit words, buffer_store_short two bytes."""
    if words := re.search(r"dwordx?(\d?)", name):
        return 4 * int(words.group(1) or 1)
    return 1 if "byte" in name else 2


def _kind(operand: str) -> str:
    return KINDS.get(operand, "8-bit" if "8" in operand else "16-bit")


def _memory_use(name: str) -> Use:
    width = access_bytes(name)
    moved = width * LANES
    if name.startswith("scratch_"):
        return Use("vmem", "vmem", moved)
    if "_load" in name:
        return Use("vmem", "vmem", moved, loaded=moved, width=width)
    if re.search("_store|_atomic", name):
        return Use("vmem", "vmem", moved, stored=moved, width=width)
    return Use(OTHER)  # invalidates or writes back a cache


def _local_bytes(name: str) -> int:
    """ds_read_b128 moves 16 bytes, ds_write2st64_b64 two times 8, ds_bpermute_b32 4."""
    bits = re.search(r"_[biuf](\d+)", name)
    return (int(bits.group(1)) // 8 if bits else 4) * (2 if re.match(r"ds_(read|write)2", name) else 1)
