"""One instruction of machine code, whatever the vendor, and the names of what it may use."""

import dataclasses

MATRIX, ISSUE, OTHER = "matrix", "issue", "other"


@dataclasses.dataclass(frozen=True)
class Use:
    """What one instruction asks of the hardware.

    group: what it belongs to, a key of Rates.threads, MATRIX, a data path, or OTHER; bytes are a warp's, but of an
    instruction that is issued once for a whole program, as tcgen05's matrix product is.
    """

    group: str = OTHER
    path: str = ""  # the data path that `moved` bytes take, if any
    moved: int = 0
    loaded: int = 0  # bytes from global memory
    stored: int = 0
    width: int = 0  # bytes of one thread's access to global memory
    flops: int = 0  # operations of a matrix product
    kind: str = ""  # of its operands, a key of Rates.matrix
    once: bool = False
    unknown: bool = False  # whether its size is not in the machine code


@dataclasses.dataclass(frozen=True)
class Instruction:
    """text: as the disassembler prints it; labels: those in front of it; target: the label that it may jump to."""

    name: str
    text: str
    use: Use
    labels: tuple[str, ...] = ()
    target: str = ""
    ends: bool = False  # whether what follows it is only reached by a jump
    source: str = ""  # "file.py:12", where the compiler knows

    @property
    def stem(self) -> str:
        """The operation without its modifiers."""
        return self.name.split(".")[0].removesuffix("_e32").removesuffix("_e64")
