"""GPUs as the cost model sees them: data-sheet figures, what of them is reached, how many CTAs fit an SM.

Figures are per second and in bytes. An SM is a compute unit on AMD, a warp a wavefront, shared memory the
LDS. A device at hand is described by replacing fields with what was measured on it:
`dataclasses.replace(GPUS["H200"], dram=4.4e12)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import TuningError

KB, MB = 1 << 10, 1 << 20
BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # of a value, by how it is multiplied
PARTITIONS = 4  # of an SM or compute unit, each with a quarter of the registers


@dataclass(frozen=True)
class Gpu:
    """A device.

    Attributes:
        name, target: product, and the compiler's name of its architecture.
        sms, warp: how many SMs; threads in a warp.
        dram: bytes/s of memory; l2, l2_rate: bytes of the last cache before it, bytes/s out of it.
        flops: dense FLOP/s by dtype, see BYTES.
        shared_sm, shared_cta, shared_reserved: bytes of shared memory of an SM, the most a CTA may ask
            for, and what each CTA costs on top.
        registers, granule: 32-bit registers of an SM, and of how many a warp's share is a multiple.
        warps, ctas: the most of an SM.
        launch, floor: seconds between dependent kernels of one graph, and of the shortest kernel.
        dram_fraction, dense_fraction, moe_fraction, atomic_fraction: reached parts of `dram` by a streaming
            kernel, of `flops` by a dense product and by one over experts, of `dram` by fp32 atomics.
        latency: seconds from a load to its value under load.
        sync_mma: speed of mma.sync as a part of `flops`, where the architecture has a faster wgmma.
    """

    name: str
    target: str
    sms: int
    dram: float
    flops: Mapping[str, float]
    l2: int
    l2_rate: float
    shared_sm: int
    shared_cta: int
    warp: int = 32
    shared_reserved: int = KB
    registers: int = 1 << 16
    granule: int = 256
    warps: int = 64
    ctas: int = 32
    launch: float = 1.2e-6
    floor: float = 1.8e-6
    dram_fraction: float = 0.761
    dense_fraction: float = 0.655
    moe_fraction: float = 0.479
    atomic_fraction: float = 0.52
    latency: float = 0.8e-6
    sync_mma: float = 1.0

    def bandwidth(self) -> float:
        """Reached bytes/s of memory."""
        return self.dram * self.dram_fraction

    def rate(self, dtype: str, part: float) -> float:
        """FLOP/s of a dtype at a reached part. Raises TuningError for a dtype without a figure."""
        if dtype not in self.flops:
            raise TuningError(
                f"{self.name} has no figure for {dtype!r}; expected one of {[*self.flops]}."
            )
        return self.flops[dtype] * part

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """How many CTAs run on an SM at once; 0 if not one fits.

        registers: per thread (on AMD vector and accumulator registers together); shared: bytes per CTA;
        warps: per CTA. The rules of NVIDIA's occupancy calculator; barriers are not counted.
        """
        if shared > self.shared_cta or not 0 < warps <= self.warps:
            return 0
        share = -(-max(registers, 1) * self.warp // self.granule) * self.granule
        by_registers = PARTITIONS * (self.registers // PARTITIONS // share) // warps
        by_shared = self.shared_sm // (shared + self.shared_reserved) if shared else self.ctas
        return min(by_registers, by_shared, self.warps // warps, self.ctas)


# The fractions are those of an H200 whose copies reach 4.3 TB/s and whose products 790 TFLOP/s, of which
# streaming kernels take 85 %, dense products 82 %, products over experts 60 %: a model until measured. So are
# launch, floor and latency, and atomic_fraction, which follows from that model's figures for 512 tokens.
# L2 rates: Chips and Cheese's measurements (H100 2023; MI300X's Infinity Cache 2024), A100's scaled by clock.
# mma.sync on Hopper: 62 % of wgmma (Luo et al. 2024, arXiv:2402.13499).
_HOPPER = {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}

H200 = Gpu(  # NVIDIA H200 data sheet, SXM; L2 as its driver reports it
    name="H200",
    target="sm_90",
    sms=132,
    dram=4.8e12,
    flops=_HOPPER,
    l2=60 * MB,
    l2_rate=5.5e12,
    shared_sm=228 * KB,
    shared_cta=227 * KB,
    sync_mma=0.62,
)
H100 = replace(H200, name="H100", dram=3.35e12, l2=50 * MB)  # NVIDIA H100 data sheet, SXM
A100 = Gpu(  # NVIDIA A100 data sheet, SXM 80 GB
    name="A100",
    target="sm_80",
    sms=108,
    dram=2.039e12,
    flops={"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    l2=40 * MB,
    l2_rate=4.4e12,
    shared_sm=164 * KB,
    shared_cta=163 * KB,
)
MI300X = Gpu(  # AMD Instinct MI300X data sheet; CDNA 3 instruction set reference for registers
    name="MI300X",
    target="gfx942",
    sms=304,
    dram=5.3e12,
    flops={"bf16": 1307.4e12, "fp16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12},
    l2=256 * MB,
    l2_rate=11.9e12,
    shared_sm=64 * KB,
    shared_cta=64 * KB,
    warp=64,
    shared_reserved=0,
    registers=1 << 17,
    granule=512,
    warps=32,
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in (H200, H100, A100, MI300X)}
TARGETS: Mapping[str, Gpu] = {gpu.target: gpu for gpu in (H100, H200, A100, MI300X)}
