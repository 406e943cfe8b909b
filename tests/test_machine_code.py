"""The machine code of every launch configuration, compiled for sm_80 and sm_90 without a GPU."""

import functools
from collections import Counter

import pytest
import torch
from fastagop.kernels.triton_backend import launch_config
from fastagop.kernels.triton_backend.backend import has_products, input_precisions
from fastagop.kernels.triton_backend.launch_config import Config
from kernel_cases import DEVICES, GAUSSIAN, LAPLACE, cases, one_of_each_class
from pair_cases import on

from bench import machine_code
from bench.machine_code import Code, Loop

triton = pytest.importorskip("triton")

CHIPS = sorted(machine_code.SHARED)
# Older compilers than those that the configurations were chosen with may spill or hold more registers.
CHOSEN_WITH = (3, 6)
NEW = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= CHOSEN_WITH
QUICK = [("update", "tf32", 80), ("matrix", "fp64", 90)]
ENTRIES = [(*launch, chip) for launch in sorted(launch_config.TABLE[8]) for chip in CHIPS]
# Test_every_launch has the Laplace kernel's; parameters are loaded, so one kernel of a class has the code of all.
OF_PRODUCTS = [(operation, "fp16x3") for operation in ("matrix", "matmul")]
FURTHER = [case for case in one_of_each_class(cases(DEVICES, "triton")) if case not in (LAPLACE, GAUSSIAN)]

# Configurations that the table once had, and what was wrong with their machine code.
OLD = [
    (("gram", "fp16x3", 80), Config(64, 64, 32, 8, 3), ["redundant work: the inner loop does 2 times"]),
    (
        ("gram", "fp16x3", 90),
        Config(64, 64, 32, 8, 3),
        ["redundant work: the inner loop does 1.33 times", "accumulators"],
    ),
    (("gram", "bf16x3", 90), Config(64, 64, 32, 8, 3), ["redundant work: the inner loop does 1.67 ", "accumulators"]),
    (("matmul", "fp16x3", 80), Config(32, 32, 32, 4, 3), ["redundant work: the inner", "redundant work: the outer"]),
    (("matrix", "fp16x3", 80), Config(128, 64, 32, 8, 3, programs=2), ["programs: a multiprocessor holds 1"]),
    (("panel", "fp16x3", 80), Config(128, 128, 32, 8, 3), ["spills"]),
]


def compiled(operation, precision, chip, config=None, **how):
    """One launch configuration, where this Triton has its products."""
    if precision == "fp64" and not has_products(torch.float64):
        pytest.skip("this Triton has no float64 products")
    if precision == "bf16x3" and "bf16x3" not in input_precisions():
        pytest.skip("this Triton has no bf16x3 products")
    return machine_code.compiled(operation, precision, chip, config, **how)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")


def check(code, operation, precision):
    assert code.shared <= machine_code.SHARED[code.capability][1]
    if NEW:
        assert machine_code.faults(code, operation, precision) == []


@pytest.mark.parametrize(("operation", "precision", "chip"), QUICK)
def test_some_launches(operation, precision, chip):
    check(compiled(operation, precision, chip), operation, precision)


@pytest.mark.parametrize(("operation", "precision", "chip"), [entry for entry in ENTRIES if entry not in QUICK])
def test_every_launch(operation, precision, chip):
    check(compiled(operation, precision, chip), operation, precision)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", FURTHER, ids=str)
@pytest.mark.parametrize(
    ("operation", "precision", "weight"),
    [("matrix", "fp16x3", True), ("matrix", "fp64", False)],  # what holds most registers; what solve starts from
)
def test_further_profiles(operation, precision, weight, case, chip):
    check(compiled(operation, precision, chip, profile=case.kernel, weight=weight), operation, precision)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("operation", "precision", "kernel"),
    [
        (*launch, kernel)
        for kernel in {type(kernel): kernel for kernel in reversed(on("triton").values())}.values()  # a class's first
        for launch in (launch_config.PLAIN if kernel.measure == "l1" else OF_PRODUCTS)
    ],
)
def test_kernels_that_are_not_radial(operation, precision, kernel, chip):
    """l1 distances take no tensor instructions in their inner loops; those of products keep to their table entries."""
    code = compiled(operation, precision, chip, profile=kernel)
    check(code, operation, precision)
    assert bool(code.tensor_loops) == (precision != "fp32")


@pytest.mark.parametrize("chip", CHIPS)
def test_an_odd_n(chip):
    """Rows of work matrices are aligned, so loads stay 16 bytes wide and a factorisation spills nothing."""
    (even,), (odd,) = (compiled("gradient", "fp16x3", chip, odd=odd).tensor_loops for odd in (False, True))
    wide = [sum(count for name, count in loop.counts.items() if name.endswith(".128")) for loop in (even, odd)]
    assert wide[0] == wide[1] > 0
    check(compiled("update", "tf32x3", chip, odd=True), "update", "tf32x3")
    check(compiled("panel", "fp16x3", chip, odd=True), "panel", "fp16x3")


@pytest.mark.parametrize("chip", CHIPS)
def test_panels_times_an_inverse(chip):
    """The loop that ends at the diagonal is the loop of the update."""
    (whole,), (cut,) = (compiled("panel", "fp16x3", chip, triangle=cut).tensor_loops for cut in (False, True))
    assert cut.flop == whole.flop
    assert cut.size <= 1.1 * whole.size
    check(compiled("panel", "fp16x3", chip, triangle=True), "panel", "fp16x3")


@pytest.mark.skipif(not NEW, reason="these faults are those of newer compilers")
@pytest.mark.parametrize(("entry", "config", "expected"), OLD)
def test_old_configurations_are_found(entry, config, expected):
    found = machine_code.faults(compiled(*entry, config), *entry[:2])
    assert len(found) == len(expected)
    assert all(word in text for word, text in zip(expected, found, strict=True))


ASSEMBLY = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;    /* 0x00000a00ff017624 */
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/                   LDS.128 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/              @P1  BRA 0xa0 ;
        /*0060*/             @!P0  BRA 0x20 ;
        /*0070*/                   STS.64 [R3], R4 ;
        /*0080*/               @P2 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   STL [R1], R4 ;
        /*00b0*/                   BRA 0x70 ;
        /*00c0*/                   BRA 0xc0 ;
        /*00d0*/                   NOP ;
"""


def test_loops_are_those_of_the_branches():
    """A loop within a loop; what lies behind the end and jumps back is the outer one's; padding is none."""
    outer, inner = machine_code.loops(ASSEMBLY)
    assert (outer.innermost, inner.innermost) == (False, True)
    assert inner.counts == Counter({"LDS.128": 1, "HMMA.16816.F32": 2, "BRA": 2})
    assert outer.number("STL", "LDL") == 2
    assert outer.stored == 8
    assert inner.flop == outer.flop == 2 * 4096


@pytest.mark.parametrize(
    ("instruction", "flop"),
    [
        ("HMMA.16816.F32", 4096),
        ("HMMA.16816.F32.BF16", 4096),
        ("HMMA.1688.F32.TF32", 2048),
        ("DMMA.884", 512),
        ("DMMA.8x8x4", 512),
        ("HGMMA.64x128x16.F32", 65536),  # a quarter of the warpgroup's
        ("FFMA", 0),
    ],
)
def test_flop(instruction, flop):
    assert machine_code.flop(instruction) == flop


def test_unknown_tensor_instructions_are_refused():
    with pytest.raises(ValueError, match=r"UTCHMMA\.2CTA is a tensor instruction of unknown size"):
        machine_code.flop("UTCHMMA.2CTA")


def loop(innermost=True, **counts):
    return Loop(Counter({name.replace("_", "."): count for name, count in counts.items()}), innermost)


def test_faults_are_named():
    """On a tile whose work is known: 64 x 64 x 16 by four warps take 32 instructions a product."""
    config = Config(64, 64, 16, 4, 3)
    entry = functools.partial(machine_code.faults, operation="gram", precision="fp16x3")

    def code(registers=168, shared=32_768, config=config, **counts):
        return Code(config, 80, (loop(**{"HMMA_16816_F32": 24, **counts}),), registers, shared)

    assert entry(code()) == []
    assert "2 times the products" in entry(code(HMMA_16816_F32=48))[0]
    assert "stores 1536 bytes" in entry(code(STS=1, STS_64=1))[0]
    assert "1 local loads and stores in the inner loop" in entry(code(LDL=1))[0]
    around = loop(False, HMMA_16816_F32=24, LDL=4, FFMA=370)
    spilled = Code(config, 80, (loop(HMMA_16816_F32=24), around), 168, 32_768)
    assert "4 local loads and stores among 398 instructions" in entry(spilled)[0]
    three = Config(64, 64, 16, 4, 3, programs=3)
    assert entry(code(config=three)) == []
    assert "holds 2 and the table says 3" in entry(code(registers=169, config=three))[0]
    assert "holds 2 and the table says 3" in entry(code(shared=65_536, config=three))[0]
