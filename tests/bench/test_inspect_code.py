"""Machine code read without a compiler: instructions, loops, cycles and occupancy of small programs written by hand."""

import pytest

pytest.importorskip("triton")

from nearpeak_bench.inspect import amdgcn, loops, pipes, sass
from nearpeak_bench.inspect.instructions import MATRIX, OTHER
from nearpeak_bench.inspect.occupancy import occupancy
from nearpeak_bench.inspect.targets import TARGETS

# An outer loop with two inner ones (the second with more traffic), a wait out of line, and the trap at the end.
PROGRAM = """
.text.kernel:
        /*0000*/                   S2R R5, SR_CTAID.X ;
.L_x_0:
        /*0010*/                   FADD R0, R0, R1 ;
\t//## File "/somewhere/softmax.py", line 12
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 BRA `(.L_x_5) ;
.L_x_2:
        /*0040*/                   FFMA R0, R4, R5, R0 ;
\t//## File "/somewhere/softmax.py", line 14
        /*0050*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_3:
        /*0060*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/              @!PT LDS RZ, [RZ] ;
        /*00a0*/               @P0 BRA `(.L_x_3) ;
        /*00b0*/              @!P1 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R3 ;
        /*00e0*/              @!P0 BRA `(.L_x_5) ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_9:
        /*0100*/                   BRA `(.L_x_9);
        /*0110*/                   NOP;
"""


def names(instructions, indices):
    return [instructions[index].name for index in indices]


def test_instructions_carry_their_labels_jumps_and_source():
    parsed = sass.parse(PROGRAM)
    assert len(parsed) == 18
    load, jump = parsed[2], parsed[3]
    assert (load.name, load.labels, load.source) == ("LDG.E.128", (".L_x_1",), "softmax.py:12")
    assert (jump.text, jump.target, jump.ends) == ("@!P0 BRA `(.L_x_5)", ".L_x_5", False)
    assert parsed[5].source == "softmax.py:14"
    assert [each.ends for each in parsed if each.name in ("EXIT", "BRA.U")] == [False, True], "BRA.U has a condition"


def test_hottest_loop_is_the_inner_one_with_the_most_traffic():
    parsed = sass.parse(PROGRAM)
    assert names(parsed, loops.hottest(parsed)) == ["LDG.E.128", "STG.E.U16", "MUFU.EX2", "LDS", "BRA"]


def test_a_loop_holds_what_lies_out_of_line():
    first = [2, 3, 4, 5, 13, 14, 15]
    parsed = sass.parse(PROGRAM.replace("STG.E.U16 desc[UR4][R2.64], R4", "NOP").replace("LDS RZ", "NOP RZ"))
    assert loops.hottest(parsed) == [6, 7, 8, 9, 10], "the same traffic in fewer instructions"
    quiet = PROGRAM.replace("STG.E.U16", "LDS").replace("/*0060*/                   LDG.E.128", "/*0060*/ LDS")
    parsed = sass.parse(quiet)
    assert loops.hottest(parsed) == first
    assert names(parsed, first[-3:]) == ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "BRA"]


def test_matrix_work_counts_before_traffic_and_leaner_loops_before_padded_ones():
    product = " HMMA.16816.F32.BF16 R4, R8, R10, R4 ;"
    masked = [".L_x_1:", " ISETP P0, R1, R2 ;", " LDG.E R12, [R2] ;", product, " @P0 BRA `(.L_x_1) ;"]
    whole = [".L_x_2:", product, " @P0 BRA `(.L_x_2) ;"]
    copying = [".L_x_3:", " LDG.E.128 R4, [R2] ;", " STG.E.128 [R2], R4 ;", " @P0 BRA `(.L_x_3) ;", " EXIT ;"]
    parsed = sass.parse("\n".join([*masked, *whole, *copying]))
    assert loops.hottest(parsed) == [4, 5]


def test_a_program_without_loops_has_no_hottest_one():
    assert loops.hottest(sass.parse(" FADD R0, R0, R1 ;\n EXIT ;")) == []
    assert loops.hottest([]) == []


@pytest.mark.parametrize(
    ("name", "operands", "flops", "kind"),
    [
        ("HMMA.16816.F32.BF16", "R4, R8, R10, R4", 2 * 16 * 8 * 16, "16-bit"),
        ("HMMA.16816.F16", "R4, R8, R10, R4", 2 * 16 * 8 * 16, "16-bit, 16-bit sums"),
        ("HMMA.1688.F32.TF32", "R4, R8, R10, R4", 2 * 16 * 8 * 8, "tf32"),
        ("IMMA.16832.S8.S8", "R4, R8, R10, R4", 2 * 16 * 8 * 32, "int8"),
        ("QMMA.16832.F32.E5M2.E5M2", "R4, R8, R10, R4", 2 * 16 * 8 * 32, "8-bit"),
        ("DMMA.8x8x4", "R4, R8, R10, R4", 2 * 8 * 8 * 4, "float64"),
        ("HGMMA.64x128x16.F32.BF16", "R24, R88, gdesc[UR8], R24, gsb0", 2 * 64 * 128 * 16 // 4, "16-bit"),
    ],
)
def test_shapes_of_matrix_products(name, operands, flops, kind):
    use = sass.use_of(name, operands)
    assert (use.group, use.flops, use.kind, use.unknown) == (MATRIX, flops, kind, False)


def test_a_warpgroup_reads_its_operands_from_shared_memory():
    second = sass.use_of("HGMMA.64x128x16.F32.BF16", "R24, R88, gdesc[UR8], R24, gsb0")
    both = sass.use_of("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24, gsb0")
    assert 4 * second.moved == 128 * 16 * 2
    assert 4 * both.moved == (128 + 64) * 16 * 2


def test_a_product_in_tensor_memory_has_the_shape_of_its_descriptor():
    # Descriptor: M / 16 from bit 24, N / 8 from bit 17, operands in bfloat16 from bit 7.
    descriptor = 8 << 24 | 16 << 17 | 1 << 7
    product = " UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10], tmem[UR26], idesc[UR27], UPT ;"
    use = sass.parse(f" UMOV UR27, {descriptor:#x} ;\n{product}")[1].use
    assert (use.flops, use.once, use.unknown) == (2 * 128 * 128 * 16, True, False)
    assert sass.parse(product)[0].use.unknown, "without the descriptor"


@pytest.mark.parametrize(
    ("name", "moved", "loaded", "stored", "width"),
    [
        ("LDG.E.128", 512, 512, 0, 16),
        ("LDGSTS.E.BYPASS.128", 512, 512, 0, 16),
        ("STG.E.U16", 64, 0, 64, 2),
        ("STG.E", 128, 0, 128, 4),
        ("LDS.64", 256, 0, 0, 0),
        ("LDSM.16.MT88.4", 512, 0, 0, 0),
        ("LDSM.16.M88", 128, 0, 0, 0),
        ("SHFL.BFLY", 128, 0, 0, 0),
    ],
)
def test_bytes_of_transfers(name, moved, loaded, stored, width):
    use = sass.use_of(name)
    assert (use.path, use.moved, use.loaded, use.stored, use.width) == ("lsu", moved, loaded, stored, width)


@pytest.mark.parametrize(
    ("name", "pipe"),
    [
        ("FFMA.FTZ", "float"),
        ("FADD2", "packed float"),
        ("IMAD.MOV.U32", "integer multiply"),
        ("MUFU.EX2", "special"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("FMNMX3", "alu"),
        ("HFMA2.BF16_V2", "half"),
        ("DFMA", "double"),
        ("UIADD3", OTHER),
        ("BAR.SYNC", OTHER),
    ],
)
def test_pipes_of_instructions(name, pipe):
    assert sass.use_of(name).group == pipe


ASSEMBLY = """
kernel:
\ts_load_dwordx4 s[8:11], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 47 5 is_stmt 1                ; attention.py:47:5 @[ attention.py:143:12 ]
\tbuffer_load_dwordx4 v[0:3], v4, s[8:11], 0 offen
\tv_exp_f32_e32 v5, v5
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tds_read2_b64 v[6:9], v10 offset1:1
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_short v[2:3], v5, off
\ts_endpgm
.Lfunc_end0:
\tv_mov_b32_e32 v0, v1
"""


def test_assembly_of_amd():
    parsed = amdgcn.parse(ASSEMBLY)
    assert [each.use.group for each in parsed] == [
        "scalar", "vmem", "transcendental", MATRIX, "lds", OTHER, "vmem", OTHER,
    ]  # fmt: skip
    assert loops.hottest(parsed) == [1, 2, 3, 4, 5]
    assert parsed[1].source == "attention.py:47"
    load, product, local, store = (parsed[index].use for index in (1, 3, 4, 6))
    assert (load.loaded, load.width) == (64 * 16, 16)
    assert (product.flops, product.kind) == (2 * 32 * 32 * 8, "16-bit")
    assert local.moved == 64 * 2 * 8
    assert (store.stored, store.width) == (64 * 2, 2)


def test_a_loop_may_run_on_into_its_header():
    """As AMD's compiler lays them out: entered in the middle, its last block in front of its first."""
    code = "\ts_branch .LBB0_3\n.LBB0_2:\n\tv_add_f32_e32 v0, v0, v1\n\ts_cbranch_scc0 .LBB0_4\n.LBB0_3:\n"
    code += "\tv_exp_f32_e32 v5, v5\n\ts_branch .LBB0_2\n.LBB0_4:\n\ts_endpgm\n"
    assert loops.hottest(amdgcn.parse(code)) == [1, 2, 3, 4]


def test_cycles_by_hand():
    """4 warps: 2 x 4 x 32 threads at 16 a clock; 512 bytes a warp at 128; 4 x 4096 operations at 2048."""
    code = " MUFU.EX2 R0, R0 ;\n MUFU.EX2 R1, R1 ;\n LDG.E.128 R4, [R2] ;\n HMMA.16816.F32.BF16 R4, R8, R10, R4 ;"
    found = pipes.estimate(sass.parse(code), True, TARGETS["sm_80"], warps=4)
    assert found.cycles == {MATRIX: 8.0, "xu": 16.0, "lsu": 16.0, "issue": 4.0}
    assert found.counts == {MATRIX: 1, "xu": 2, "lsu": 1}
    assert (found.loaded, found.stored, found.flops) == (2048, 0, 16384)
    assert found.mix == {"MUFU": 2, "LDG": 1, "HMMA": 1}
    assert (found.bound, found.bound_cycles) == ("xu", 16.0)
    bytes_a_clock = 2039 / 108 / 1.41  # the A100's gigabytes a second, by multiprocessor and clock
    assert found.memory_cycles == pytest.approx(2048 / bytes_a_clock)
    assert found.cached == pytest.approx(1 - 16 / found.memory_cycles)


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        # From NVIDIA's occupancy calculator: 256 threads of 32, 33, 64 and 255 registers.
        ("sm_80", 8, 32, 0, (8, 1.0, "warps")),
        ("sm_80", 8, 33, 0, (6, 0.75, "registers")),
        ("sm_80", 8, 64, 0, (4, 0.5, "registers")),
        ("sm_80", 8, 255, 0, (1, 0.125, "registers")),
        ("sm_86", 8, 32, 0, (6, 1.0, "warps")),
        ("sm_90", 4, 32, 48 * 1024, (4, 0.25, "shared memory")),
        ("sm_80", 1, 16, 0, (32, 0.5, "programs")),
        ("sm_86", 8, 32, 100 * 1024, (0, 0.0, "shared memory")),
        # A SIMD of CDNA 3 has 512 registers: two waves of 252, one of 258.
        ("gfx942", 4, 252, 0, (2, 0.25, "registers")),
        ("gfx942", 4, 258, 0, (1, 0.125, "registers")),
    ],
)
def test_occupancy(target, warps, registers, shared, expected):
    assert tuple(occupancy(TARGETS[target], warps, registers, shared)) == expected


def test_tensor_memory_limits_programs_too():
    assert occupancy(TARGETS["sm_100"], 4, 32, 0, tensor_memory=256).programs == 2


def test_peak_rates_are_those_of_the_data_sheets():
    """Dense 16-bit peaks in TFLOP/s: rate x processors x clock."""
    sheets = {"sm_80": (312, 1.41), "sm_90": (989, 1.83), "sm_100": (2250, 1.85), "sm_89": (165.2, 2.52),
              "sm_120": (209.5, 2.41), "gfx942": (1307, 2.1), "sm_86": (154.8, 1.8)}  # fmt: skip
    for name, (peak, clock) in sheets.items():
        target = TARGETS[name]
        rate = target.rates.matrix["16-bit"] * target.device.processors * clock / 1000
        assert rate == pytest.approx(peak, rel=0.02), name
