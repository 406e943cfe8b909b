"""The machine code of every Triton launch, compiled and read without a GPU: what its inner loops do, and what it holds.

Triton brings the assembler and the disassembler. Nothing here runs on a GPU, and no figure of it is a measurement.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastagop.kernels.profile import Kernel
from fastagop.kernels.triton_backend import launch_config
from fastagop.kernels.triton_backend.launch_config import Config

from bench import files
from fastagop import Laplace

PAGE = files.ROOT / "docs/pages/gpu.md"
PRODUCTS = {"fp16x3": 3, "bf16x3": 3, "tf32x3": 3, "tf32": 1, "fp64": 1}  # tensor products that make one
COUNTS = {"m", "n", "d", "p", "b", "K", "first", "stop", "n_wide", "d_wide"}
FEW = 0.01  # of the instructions around an inner loop may be spills
_LAPLACE = Laplace(1.0)  # any number: profiles load it
WIDTH = 16  # columns of V that a pass of the fused product takes, as for ten classes; it takes up to 64

# Of a multiprocessor, by compute capability: bytes of shared memory in all and of one program (NVIDIA's tuning
# guides), the latter on the smallest chips that take the same launches: 8.6, 8.9 and 12.x have 99 KiB of it. Both have
# 65,536 registers and room for 64 warps, and a program takes 1 KiB of shared memory beside its own.
SHARED = {80: (167_936, 101_376), 90: (233_472, 232_448)}
REGISTERS, WARPS, SYSTEM = 65_536, 64, 1024
# Floating-point operations that one of its four schedulers' tensor units does in a cycle, from A100's and H100's peaks.
RATES = {80: {"half": 512, "tf32": 256, "fp64": 32}, 90: {"half": 1024, "tf32": 512, "fp64": 64}}


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code: how often each instruction stands in it, and whether another loop lies within."""

    counts: Counter[str]
    innermost: bool

    def number(self, *names: str) -> int:
        """Instructions of these names, whatever their suffixes."""
        return sum(count for name, count in self.counts.items() if name.split(".")[0] in names)

    @property
    def flop(self) -> int:
        """Floating-point operations of a warp's tensor instructions."""
        return sum(count * flop(name) for name, count in self.counts.items())

    @property
    def size(self) -> int:
        """Instructions."""
        return sum(self.counts.values())

    def cycles(self, capability: int) -> float:
        """Cycles that a warp's tensor instructions take of its scheduler's tensor unit."""
        rates = RATES[capability]
        return sum(count * flop(name) / rates[_factors(name)] for name, count in self.counts.items())

    @property
    def stored(self) -> int:
        """Bytes that a thread stores to shared memory, asynchronous copies from global memory left out."""
        return sum(count * _stored(name) for name, count in self.counts.items())


@dataclass(frozen=True)
class Code:
    """A compiled launch: its loops in the order of the code, registers of a thread, bytes of shared memory."""

    config: Config
    capability: int
    loops: tuple[Loop, ...]
    registers: int
    shared: int

    @property
    def tensor_loops(self) -> list[Loop]:
        """Innermost loops that hold tensor instructions."""
        return [loop for loop in self.loops if loop.innermost and loop.flop]

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once."""
        held = -(-self.registers // 8) * 8 * 32 * self.config.warps
        whole, _ = SHARED[self.capability]
        return min(REGISTERS // held, whole // (self.shared + SYSTEM), WARPS // self.config.warps)

    @property
    def share(self) -> tuple[float, float]:
        """Least and most of the tensor peak that the inner loop can reach, by the cycles of its instructions alone.

        At the least a warp's tensor instructions wait for all others, at the most nothing waits. Memory is left out.
        """
        (loop,) = self.tensor_loops
        tensor = loop.cycles(self.capability)
        return tensor / (tensor + loop.size), min(1.0, tensor / loop.size)


def faults(code: Code, operation: str, precision: str) -> list[str]:
    """What is wrong with a compiled launch, in words; an empty list where nothing is.

    Spills in an epilogue cost little beside the inner loop: they count where a loop around it has many, and else not.
    """
    config, found = code.config, []
    if precision == "fp32":
        return _spills(code.loops, 0.0) + _programs(code)
    if len(code.tensor_loops) != 1:
        return [f"{len(code.tensor_loops)} inner loops have tensor instructions, not one"]
    (inner,) = code.tensor_loops
    work, needed = inner.flop * config.warps, 2 * config.rows * config.columns * config.inner * PRODUCTS[precision]
    if work != needed:
        found.append(f"redundant work: the inner loop does {work / needed:.3g} times the products of its tile")
    if operation == "matmul":
        second = PRODUCTS[_second(precision)] * 2 * config.rows * config.columns * WIDTH
        outer = max(loop.flop for loop in code.loops) * config.warps - work
        if not second <= outer < 2 * second:  # the assembler repeats some of it for the way of near pairs
            found.append(f"redundant work: the outer loop does {outer / second:.3g} times the second product")
    stored = inner.stored * 32 * config.warps
    # Both operands may pass through shared memory once they are split; halves come as the instructions take them.
    parts = 8 if precision == "tf32x3" else 0 if precision == "fp16x3" and operation != "gradient" else 4
    operands = (config.rows + config.columns) * config.inner * parts
    if stored > operands:
        found.append(f"accumulators: the inner loop stores {stored} bytes to shared memory; operands have {operands}")
    around = [loop for loop in code.loops if not loop.innermost and loop.flop]
    return found + _spills((inner,), 0.0) + _spills(around, FEW) + _programs(code)


def _spills(loops: Iterable[Loop], share: float) -> list[str]:
    """What loops spill beyond a share of their instructions, in words."""
    found = ((loop, loop.number("LDL", "STL")) for loop in loops)
    return [
        f"spills: {spilled} local loads and stores in the inner loop"
        if loop.innermost
        else f"spills: {spilled} local loads and stores among {loop.size} instructions around the inner loop"
        for loop, spilled in found
        if spilled > share * loop.size
    ]


def _programs(code: Code) -> list[str]:
    """Where a multiprocessor holds fewer programs than the table says, in words."""
    if code.programs >= code.config.programs:
        return []
    return [
        f"programs: a multiprocessor holds {code.programs} and the table says {code.config.programs}; one takes "
        f"{code.registers} registers a thread and {code.shared} bytes of shared memory"
    ]


def flop(instruction: str) -> int:
    """Floating-point operations of a tensor instruction, a warp's share of those of a warpgroup; 0 of any other."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        m, n, k = (int(part) for part in found.groups())
        return 2 * m * n * k // 4
    if found := re.match(r"[HD]MMA\.(16|8)(8)(16|8|4)\b", instruction):
        m, n, k = (int(part) for part in found.groups())
        return 2 * m * n * k
    if found := re.match(r"[HD]MMA\.(\d+)x(\d+)x(\d+)", instruction):
        m, n, k = (int(part) for part in found.groups())
        return 2 * m * n * k
    if re.match(r"\w*MMA\b", instruction):
        raise ValueError(f"{instruction} is a tensor instruction of unknown size; teach machine_code.flop its size")
    return 0


def _factors(instruction: str) -> str:
    """What a tensor instruction multiplies: halves of 16 bits, TF32 or float64."""
    return "fp64" if instruction.startswith("D") else "tf32" if "TF32" in instruction else "half"


def _stored(instruction: str) -> int:
    name, *suffixes = instruction.split(".")
    if name == "STSM":
        return 4 * int(next((s for s in suffixes if s.isdigit()), "1"))
    if name != "STS":
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[s] for s in suffixes if s in widths), 4)


def loops(assembly: str) -> tuple[Loop, ...]:
    """The natural loops of a disassembled kernel, in the order of their first instructions."""
    code = _instructions(assembly)
    bodies = _bodies(_successors(code))
    names = [text.split()[0] for _, text in code]
    return tuple(
        Loop(Counter(names[i] for i in body), not any(other < body for other in bodies.values()))
        for _, body in sorted(bodies.items())
    )


def _instructions(assembly: str) -> list[tuple[bool, str]]:
    """(runs always, instruction and operands); targets of branches become their instruction's place in the list."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", assembly, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _) in enumerate(found)}
    code = []
    for _, text in found:
        bare = re.sub(r"^@!?U?P\w+\s+", "", text)
        always = bare == text
        if bare.startswith(("BRA", "CALL.REL")):  # a call is how some loops are left
            *conditions, target = re.split(r"[\s,]+", bare)[1:]
            bare, always = f"{bare.split('.')[0].split()[0]} {at[int(target, 16)]}", always and not conditions
        code.append((always, bare))
    return code


def _successors(code: list[tuple[bool, str]]) -> list[list[int]]:
    """Where each instruction goes on."""
    goes: list[list[int]] = []
    for i, (always, text) in enumerate(code):
        name = text.split()[0].split(".")[0]
        after = [] if (always and name in ("BRA", "EXIT", "RET")) or i + 1 == len(code) else [i + 1]
        goes.append(after + ([int(text.split()[1])] if name in ("BRA", "CALL") else []))
    return goes


def _bodies(goes: list[list[int]]) -> dict[int, set[int]]:
    """First instruction -> instructions of each loop: what reaches a branch back to one that every way there passes."""
    comes: list[list[int]] = [[] for _ in goes]
    for i, after in enumerate(goes):
        for j in after:
            comes[j].append(i)
    found: dict[int, set[int]] = {}
    for last, after in enumerate(goes):
        for first in after:
            if first < last and last not in _reached(goes, 0, without=first):
                found.setdefault(first, {first}).update(_reached(comes, last, without=first))
    return found


def _reached(goes: list[list[int]], start: int, without: int) -> set[int]:
    """Instructions that are reached from one along ways that leave another out."""
    seen, ahead = {start} - {without}, [start] if start != without else []
    while ahead:
        for i in goes[ahead.pop()]:
            if i != without and i not in seen:
                seen.add(i)
                ahead.append(i)
    return seen


def _triton(module: str) -> Any:
    """A module of Triton, whose names differ between versions."""
    return importlib.import_module(f"triton.{module}")


@cache
def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _second(precision: str) -> str:
    """Precision of the fused product's second factor, which is split inside the instruction."""
    return {"fp16x3": "tf32x3", "fp32": "tf32x3"}.get(precision, precision)


def _kernel(operation: str) -> Any:
    from fastagop.kernels.triton_backend import agop, cholesky, l1_gradient, matmul, matrix, panels

    return {
        "matrix": matrix._matrix_kernel,
        "matmul": matmul._matmul_kernel,
        "gradient": agop._gradient_kernel,
        "gram": agop._gram_kernel,
        "update": cholesky._update_kernel,
        "panel": panels._panel_kernel,
        "l1 gradient": l1_gradient._l1_gradient_kernel,
    }[operation]


def source(
    operation: str,
    precision: str,
    config: Config,
    profile: Kernel = _LAPLACE,
    weight: bool = True,
    odd: bool = False,
    triangle: bool = False,
) -> Any:
    """One launch as Triton compiles it: strides and pointers divisible by 16, and sizes but for an odd n."""
    from fastagop.kernels.triton_backend.profile import device_profile

    kernel = _kernel(operation)
    constants = {"PREC": precision, "BM": config.rows, "BN": config.columns, "BK": config.inner}
    constants |= {"PROFILE": device_profile(profile), "WEIGHT": weight, "LOWER": True, "WIDER": odd}
    constants |= {"OF": profile.measure, "SELF": profile.radial, "TRIANGLE": triangle}
    constants |= {"SECOND": _second(precision), "BP": WIDTH, "GROUP": launch_config.GROUPS.get(operation, 1)}
    names = kernel.arg_names
    whole = "*fp64" if precision == "fp64" else "*fp32"
    half = "*fp16" if precision == "fp16x3" else whole
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "near":
            signature[name] = "fp32"
        elif name in COUNTS or name.startswith("stride"):
            signature[name] = "i32"
        else:
            signature[name] = half if name in ("ZA", "ZL", "XA", "XL", "WA", "WL") else whole
    sizes = {"d", "n_wide", "d_wide"} | (set() if odd else {"n"}) | ({"first"} if operation == "update" else set())
    divisible = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride") or name in sizes
    ]
    held = {name: constants[name] for name in names if name in constants}
    if _version() < (3, 3):
        hints = _triton("backends.compiler").AttrsDescriptor.from_hints(dict.fromkeys(divisible, 16))
        return _triton("compiler").ASTSource(fn=kernel, signature=signature, constants=held, attrs=hints)
    return _triton("compiler").ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in held.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )


def compiled(
    operation: str,
    precision: str,
    capability: int,
    config: Config | None = None,
    **how: Any,
) -> Code:
    """Compile one launch, of the table unless a configuration is given, and read its machine code; as in ``source``."""
    table = launch_config.PLAIN if precision == "fp32" else launch_config.TABLE[capability // 10]
    config = config or table[operation, precision]
    target = _triton("backends.compiler").GPUTarget("cuda", capability, 32)
    made = source(operation, precision, config, **how)
    options = {**config.launch, "enable_fp_fusion": True}
    binary = _triton("compiler").compile(made, target=target, options=options)
    assembly, usage = _disassembled(binary.asm["cubin"])
    registers = int(usage.split("REG:")[1].split()[0])
    return Code(config, capability, loops(assembly), registers, binary.metadata.shared)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """The assembly and the resource usage of a binary, by the tool that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        assembly, usage = (
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
        return assembly, usage


COLUMNS = {
    "operation": "{operation}",
    "products": "{precision}",
    "chip": "sm_{capability}",
    "tile": "{rows} x {columns} x {inner}",
    "warps": "{warps}",
    "stages": "{stages}",
    "registers": "{registers}",
    "shared KiB": "{shared:.0f}",
    "programs": "{programs}",
    "tensor instructions": "{tensor}",
    "of all": "{size}",
    "predicted share of the peak": "{least:.0%} to {most:.0%}",
}


def row(operation: str, precision: str, capability: int) -> dict[str, Any]:
    """One line of the table: a launch of the launch table, compiled."""
    code = compiled(operation, precision, capability)
    if found := faults(code, operation, precision):
        raise ValueError(f"{operation} {precision} on sm_{capability}: {'; '.join(found)}")
    (inner,) = code.tensor_loops
    tensor = sum(count for name, count in inner.counts.items() if flop(name))
    least, most = code.share
    return {
        **{"operation": operation, "precision": precision, "capability": capability, "least": least, "most": most},
        **{name: getattr(code.config, name) for name in ("rows", "columns", "inner", "warps", "stages")},
        **{"registers": code.registers, "shared": code.shared / 1024, "programs": code.programs},
        **{"tensor": tensor, "size": inner.size},
    }


def main(page: Path = PAGE) -> None:
    """Compile every launch and write the table between the page's marks."""
    import triton

    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    text = page.read_text()
    before, rest = text.split("<!-- machine code -->\n")
    _, after = rest.split("<!-- /machine code -->")
    entries = [(*launch, capability) for launch in sorted(launch_config.TABLE[8]) for capability in SHARED]
    rows = [row(*entry) for entry in entries]
    said = f"Compiled with Triton {triton.__version__}; nothing in this table was measured on a GPU.\n\n"
    made = said + files.markdown(COLUMNS, rows)
    files.write(page, f"{before}<!-- machine code -->\n{made}\n<!-- /machine code -->{after}")
    print(made)
