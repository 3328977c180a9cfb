"""What the performance model and the resource table assume of a GPU, each number with its source.

The table knows two AMD architectures beside the families; no time is predicted for them.

Nothing here is measured.  Sources: the vendor's data sheets of A100 (80 GB SXM), H100 SXM, H200 SXM and B200 (HGX) for
bandwidth, dense bf16 rate and boost clock; the CUDA C++ programming guide, tables "technical specifications per compute
capability" and "arithmetic instructions", for everything per multiprocessor; for AMD the CDNA 2 and 3 instruction set
guides and the data sheets of MI250X (one of its two dies) and MI300X.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """What holds for every GPU of one compute capability."""

    capability: int  # 10·major + minor
    shared_per_block: int  # bytes one block may use: 163 or 227 KiB
    shared_per_sm: int  # bytes of one multiprocessor; each block costs one KiB more than it asks for
    warps_per_sm: int
    fp32_per_clock: int  # float32 lanes per multiprocessor
    mma_flops_per_clock: int  # dense bf16 by the widest instruction (mma.sync, wgmma, tcgen05), per multiprocessor


KIB = 1024
FAMILIES = {
    "sm_80": Family(80, 163 * KIB, 164 * KIB, 64, 64, 2048),
    "sm_90": Family(90, 227 * KIB, 228 * KIB, 64, 128, 4096),
    "sm_100": Family(100, 227 * KIB, 228 * KIB, 64, 128, 8192),
}


class AmdFamily(NamedTuple):
    """What fits a compute unit: four SIMDs, each of wavefronts of 64 lanes with 512 vector registers in all."""

    shared_per_block: int
    compute_units: int
    waves_per_simd: int = 8
    registers_per_simd: int = 512  # a lane's, of the wavefronts that share a SIMD; given out in units of 8
    simds: int = 4
    blocks: int = 16


AMD = {"gfx90a": AmdFamily(64 * KIB, 110), "gfx942": AmdFamily(64 * KIB, 304)}
REGISTERS_PER_SM = 65536
BLOCKS_PER_SM = 32
SCHEDULERS = 4  # per multiprocessor, one warp instruction each per clock
EXPS_PER_CLOCK = 16  # MUFU results per multiprocessor: exp2, log2, reciprocal, root
COPY_SHARE = 0.9  # of the data sheet's bandwidth that a copy reaches: 3.0 TB/s were seen on an H100, 4.3 on an H200


class Gpu(NamedTuple):
    """One product."""

    name: str
    family: str
    multiprocessors: int
    clock: float  # boost, Hz
    bandwidth: float  # of device memory, bytes/s
    bf16: float  # dense bf16 FLOP/s
    l2: int  # bytes

    @property
    def exps(self) -> float:
        """Exponentials per second: 16 per clock and multiprocessor."""
        return EXPS_PER_CLOCK * self.multiprocessors * self.clock


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 108, 1.410e9, 2.039e12, 312e12, 40 << 20),
        Gpu("H100", "sm_90", 132, 1.830e9, 3.35e12, 989e12, 50 << 20),
        Gpu("H200", "sm_90", 132, 1.830e9, 4.8e12, 989e12, 50 << 20),
        Gpu("B200", "sm_100", 148, 1.850e9, 8.0e12, 2250e12, 126 << 20),
    )
}


def resident_blocks(family: str, registers: int, shared: int, warps: int) -> int:
    """Blocks of a kernel that fit one multiprocessor at once, by registers, shared memory, warps and blocks."""
    if family in AMD:
        return _resident_on_amd(AMD[family], registers, shared, warps)
    f = FAMILIES[family]
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256 a warp
    by_registers = REGISTERS_PER_SM // per_warp // warps
    by_shared = f.shared_per_sm // (shared + KIB)
    return min(by_registers, by_shared, f.warps_per_sm // warps, BLOCKS_PER_SM)


def _resident_on_amd(f: AmdFamily, registers: int, shared: int, warps: int) -> int:
    waves = min(f.waves_per_simd, f.registers_per_simd // (-(-max(registers, 1) // 8) * 8))
    return min(waves * f.simds // warps, f.shared_per_block // max(shared, 1), f.blocks)


def target(family: str) -> tuple[str, int | str, int]:
    """What Triton compiles for: (backend, architecture, lanes of a warp)."""
    return ("hip", family, 64) if family in AMD else ("cuda", FAMILIES[family].capability, 32)


def shared_limit(family: str) -> int:
    """Bytes of shared memory that one block may use."""
    return AMD[family].shared_per_block if family in AMD else FAMILIES[family].shared_per_block
