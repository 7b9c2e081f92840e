"""NVIDIA's machine code: instructions out of what nvdisasm prints, and what each one uses.

Which instructions share a pipe: Nsight Compute documentation, "Pipelines"; matrix shapes: PTX ISA, "Warp-Level Matrix
Instructions", "Asynchronous Warpgroup-Level Matrix Instructions" and "Instruction descriptor" of tcgen05.
"""

import re

from .instructions import MATRIX, OTHER, Instruction, Use

LANES = 32
LINE = re.compile(r"^\s+(?:/\*\w+\*/)?\s*(?P<text>(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]+)(?P<operands>[^;]*));")
LABEL = re.compile(r"^(\.L_\w+):")
SOURCE = re.compile(r'//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
JUMP = re.compile(r"`\((\.L_\w+)\)")
NEVER = re.compile(r"@!U?PT\s")  # as `@!PT LDS RZ, [RZ]`, which only fills a slot
CONSTANT = re.compile(r"UMOV (UR\d+), (0x[0-9a-f]+)")

# The first that matches the operation's name decides.
GROUPS = [
    (re.compile(pattern), group)
    for pattern, group in (
        (r"(MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV)\b", "special"),
        (r"D(ADD|MUL|FMA|SETP|MNMX)", "double"),
        (r"H(ADD2|MUL2|FMA2|SET2|SETP2|MNMX2)", "half"),
        (r"F(ADD|MUL|FMA)2\b", "packed float"),
        (r"F(ADD|MUL|FMA|SWZADD)|FHADD", "float"),
        (r"(IMAD|IMUL|IDP)\b", "integer multiply"),
        (
            r"(IADD|IADD3|LEA|LOP3?|SHF|SHL|SHR|[IF]SETP|[FI]?SEL|FSET|[FI]MNMX3?|VIMNMX3?|VIADD|VIADDMNMX|PRMT|PLOP3"
            r"|SGXT|IABS|MOV|CS2R|BMSK|F2FP|I2FP|F2IP|P2R|R2P|FCHK|ISCADD|VABSDIFF4?|VOTE|REDUX)\b",
            "alu",
        ),
    )
]
MATRIX_NAME = re.compile(r"(HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC[HQIO]MMA)\b")
SHAPES = (re.compile(r"\.(8|16)(8)(4|8|16|32|64)\b"), re.compile(r"\.(\d+)x(\d+)x(\d+)\b"))  # .16816, .64x128x16


def parse(code: str) -> list[Instruction]:
    """The instructions of the one kernel in what `nvdisasm -c -novliw` prints; with `-g`, their source lines too."""
    found: list[Instruction] = []
    labels: list[str] = []
    constants: dict[str, int] = {}
    source = ""
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels.append(label.group(1))
        elif place := SOURCE.search(line):
            source = ":".join(place.groups())
        elif match := LINE.match(line):
            if constant := CONSTANT.match(match["text"]):
                constants[constant.group(1)] = int(constant.group(2), 16)
            found.append(_instruction(match, tuple(labels), constants, source))
            labels = []
    return found


def _instruction(match, labels, constants, source) -> Instruction:
    name, operands = match["name"], match["operands"].strip()
    jump = JUMP.search(operands) if re.match(r"(BRA|BRX|JMP|JMX)\b", name) else None
    # `BRA.U UP0, target` and `BRA.DIV UR4, target` depend on an operand instead of a guard.
    always = not match["guard"] and (jump is None or operands.startswith("`"))
    return Instruction(
        name=name,
        text=" ".join(match["text"].split()),
        use=Use() if NEVER.match(match["text"]) else use_of(name, operands, constants),
        labels=labels,
        target=jump.group(1) if jump else "",
        ends=always and re.match(r"(BRA|BRX|JMP|JMX|EXIT|RET|KILL|BPT)\b", name) is not None,
        source=source,
    )


def use_of(name: str, operands: str = "", constants: dict[str, int] | None = None) -> Use:
    """What an instruction uses. constants: the known contents of uniform registers, for tcgen05's shapes."""
    if MATRIX_NAME.match(name):
        return _matrix_use(name, operands, constants or {})
    if transfer := _transfer_use(name):
        return transfer
    return Use(next((group for pattern, group in GROUPS if pattern.match(name)), OTHER))


def access_bytes(name: str) -> int:
    """LDG.E.128 and STG.E.U16 name their bits; without any they move 32."""
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(bits.group(1)) // 8 if bits else 4


def _transfer_use(name: str) -> Use | None:
    stem, width = name.split(".")[0], access_bytes(name)
    moved = width * LANES
    if stem in ("LDG", "LD", "LDGSTS"):
        return Use("lsu", "lsu", moved, loaded=moved, width=width)
    if stem in ("STG", "ST", "RED", "ATOMG", "ATOM", "REDG"):
        return Use("lsu", "lsu", moved, stored=moved, width=width)
    if stem in ("LDS", "STS", "LDL", "STL", "ATOMS"):
        return Use("lsu", "lsu", moved)
    if stem in ("LDSM", "STSM"):
        # Eight rows of 16 bytes, for each of one, two or four matrices.
        return Use("lsu", "lsu", 128 * int(re.search(r"(?:\.([24]))?$", name).group(1) or 1))
    if stem == "SHFL":
        return Use("lsu", "lsu", 4 * LANES)
    if re.match(r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED", stem):
        return Use(once=True, unknown=True)  # the size is in a descriptor
    return None


def _matrix_use(name: str, operands: str, constants: dict[str, int]) -> Use:
    if name.startswith("UTC"):
        return _tensor_memory_product(name, operands, constants)
    kind, shape = _kind(name), next(filter(None, (pattern.search(name) for pattern in SHAPES)), None)
    if shape is None:
        return Use(MATRIX, kind=kind, unknown=True)
    m, n, k = map(int, shape.groups())
    if "GMMA" not in name:
        return Use(MATRIX, flops=2 * m * n * k, kind=kind)
    # Four warps share the product. The second matrix always comes out of shared memory, the first one often.
    first = not re.match(r"R\d+, R\d+", operands)
    size = (n + m * first) * k * _operand_bytes(kind)
    return Use(MATRIX, "lsu", size // 4, flops=2 * m * n * k // 4, kind=kind)


def _kind(name: str) -> str:
    if name.startswith("D"):
        return "float64"
    if name.startswith("I"):
        return "int8"
    if name.startswith(("Q", "O")):
        return "8-bit"
    if ".TF32" in name:
        return "tf32"
    return "16-bit" if ".F32" in name else "16-bit, 16-bit sums"


def _operand_bytes(kind: str) -> int:
    return {"tf32": 4, "8-bit": 1, "int8": 1}.get(kind, 2)


def _tensor_memory_product(name: str, operands: str, constants: dict[str, int]) -> Use:
    """A product by tcgen05, of the shape that its descriptor, a constant in a uniform register, tells."""
    register = re.search(r"idesc\[(UR\d+)\]", operands)
    descriptor = constants.get(register.group(1)) if register else None
    if descriptor is None:
        return Use(MATRIX, once=True, unknown=True)
    n, m = (descriptor >> 17 & 0x3F) * 8, (descriptor >> 24 & 0x1F) * 16
    half = "tf32" if descriptor >> 7 & 0x7 == 2 else "16-bit"
    kind = {"UTCH": half, "UTCI": "int8"}.get(name[:4], "8-bit")
    k = 32 // _operand_bytes(kind)
    # Operands are in shared memory, but where the first one stays in tensor memory.
    moved = (n + m * operands.startswith("gdesc")) * 32
    return Use(MATRIX, "lsu", moved, flops=2 * m * n * k, kind=kind, once=True)
