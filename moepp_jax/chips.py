"""Published peak figures of accelerators, each with the vendor's document that states it.

They are upper bounds: no program reaches them, and what is derived from them is a bound too.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device.

    Attributes:
      kinds: what `jax.Device.device_kind` calls it.
      flops: dense bfloat16 operations a second.
      tf32_flops, float32_flops: those of float32 products, rounded to TF32 as is usual, and exact;
        None where they are made of bfloat16 products.
      hbm_bytes: memory.
      hbm_bandwidth: bytes a second.
      torus: dimensions of the interconnect's torus; 0 is a switch.
      links: interconnect links of a chip; a torus has two in each dimension.
      link_bandwidth: bytes a second of one link in one direction.
      wraps_at: a torus dimension closes to a ring when its size is a multiple of this.
      dcn_bandwidth: bytes a second of a chip between slices or hosts, in one direction; None where
        it is not published.
      source: the documents.
    """

    kinds: tuple[str, ...]
    flops: float
    hbm_bytes: int
    hbm_bandwidth: int
    torus: int
    links: int
    link_bandwidth: int
    wraps_at: int
    dcn_bandwidth: float | None
    source: str
    tf32_flops: float | None = None
    float32_flops: float | None = None

    def peak(self, arithmetic: str) -> float:
        """Operations a second of products: "tf32", "f32", or what is bfloat16 or as fast."""
        own = {"tf32": self.tf32_flops, "f32": self.float32_flops}
        return own.get(arithmetic) or self.flops


CHIPS: dict[str, Chip] = {
    "v4": Chip(
        kinds=("TPU v4",),
        flops=275e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1200 * GB,
        torus=3,
        links=6,
        link_bandwidth=50 * GB,
        wraps_at=4,
        dcn_bandwidth=None,
        source="Google Cloud documentation, TPU v4; links: Jouppi et al., arXiv 2304.01433",
    ),
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819 * GB,
        torus=2,
        links=4,
        link_bandwidth=50 * GB,  # 400 GB/s a chip, both directions of 4 links
        wraps_at=16,
        dcn_bandwidth=6.4e12 / 8 / 256,  # 6.4 Tbit/s a pod of 256 chips
        source="Google Cloud documentation, TPU v5e",
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765 * GB,
        torus=3,
        links=6,
        link_bandwidth=100 * GB,  # 1,200 GB/s a chip, both directions of 6 links
        wraps_at=4,
        dcn_bandwidth=50e9 / 8,
        source="Google Cloud documentation, TPU v5p",
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1638 * GB,
        torus=2,
        links=4,
        link_bandwidth=100 * GB,  # 800 GB/s a chip, both directions of 4 links
        wraps_at=16,
        dcn_bandwidth=25.6e12 / 8 / 256,  # 25.6 Tbit/s a pod of 256 chips
        source="Google Cloud documentation, TPU v6e",
    ),
    "A100-40GB": Chip(
        kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12,
        hbm_bytes=42_298_834_944,  # of GPUs what the driver leaves to programs
        hbm_bandwidth=1555 * GB,
        torus=0,
        links=12,
        link_bandwidth=25 * GB,
        wraps_at=1,
        dcn_bandwidth=200e9 / 8,
        source="NVIDIA A100 data sheet; network: DGX A100 data sheet, 8 x 200 Gbit/s for 8 GPUs",
        tf32_flops=156e12,
        float32_flops=19.5e12,
    ),
    "A100-80GB": Chip(
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        hbm_bytes=85_100_068_864,
        hbm_bandwidth=2039 * GB,
        torus=0,
        links=12,
        link_bandwidth=25 * GB,
        wraps_at=1,
        dcn_bandwidth=200e9 / 8,
        source="NVIDIA A100 data sheet; network: DGX A100 data sheet, 8 x 200 Gbit/s for 8 GPUs",
        tf32_flops=156e12,
        float32_flops=19.5e12,
    ),
    "H100": Chip(
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989e12,
        hbm_bytes=84_942_979_072,
        hbm_bandwidth=3350 * GB,
        torus=0,
        links=18,
        link_bandwidth=25 * GB,
        wraps_at=1,
        dcn_bandwidth=400e9 / 8,
        source="NVIDIA H100 data sheet (SXM, without sparsity); network: DGX H100 data sheet",
        tf32_flops=494.5e12,
        float32_flops=67e12,
    ),
    "H200": Chip(
        kinds=("NVIDIA H200",),
        flops=989e12,
        hbm_bytes=141 * GB,  # of the data sheet; the driver's is a little more
        hbm_bandwidth=4800 * GB,
        torus=0,
        links=18,
        link_bandwidth=25 * GB,
        wraps_at=1,
        dcn_bandwidth=400e9 / 8,
        source="NVIDIA H200 data sheet (SXM, without sparsity); network: DGX H200 data sheet",
        tf32_flops=494.5e12,
        float32_flops=67e12,
    ),
    "B200": Chip(
        kinds=("NVIDIA B200",),
        flops=2250e12,
        hbm_bytes=191_514_411_008,
        hbm_bandwidth=7672 * GB,
        torus=0,
        links=18,
        link_bandwidth=50 * GB,
        wraps_at=1,
        dcn_bandwidth=400e9 / 8,
        source="NVIDIA HGX B200 data sheet (without sparsity); network: DGX B200 data sheet",
        tf32_flops=1125e12,
        float32_flops=75e12,
    ),
}


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this name, or None if its figures are not known."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
