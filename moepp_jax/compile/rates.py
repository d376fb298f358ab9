"""What a chip is taken to reach of its peak figures: every constant of an estimate, and its source.

None was measured on a TPU. They are what the TPU compiler (libtpu 0.0.42) says of bare programs for
these chips: of products and of copies, its own estimates of cycles and seconds, beside operations
and bytes; of gathers, scatters and attention, the static profile of the machine code
(`LIBTPU_INIT_ARGS=--xla_jf_dump_static_llo_profile_to=FOLDER`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moepp_jax.chips import CHIPS, Chip

# Of the peak: bare products of 1,024 x 1,024 and more have 0.96 to 0.98 in the compiler's estimates
# and in the static profile, the experts' 0.95.
PRODUCTS = 0.95

# Seconds that an instruction takes to be started, whatever it does.
LAUNCH = 1e-6

# Cycles of a gathered row (65,536 rows of 1,536 bfloat16 to 108,544 and back: 18.6; narrower rows
# of 512 bytes and more the same), and of one that is added where it is scattered to (1,024 and
# 2,048 of 1,536, beside what a copy of the array costs; of 768 it is 14).
GATHERED_ROW, SCATTERED_ROW = 18.6, 48.5

# Of a gathered number, of a scattered one.
GATHERED, SCATTERED = 7.6, 6.9

# How fast links are, as shares of their peak: the two ends of what is predicted. No compiler knows;
# a quarter is a careful user's guess for exchanges of many small messages.
LINKS = (1.0, 0.25)

# Rows of queries and of keys in a block of attention.
BLOCK = 1024


@dataclass(frozen=True)
class Rates:
    """
    Attributes:
      clock: cycles a second.
      width: of the MXU, rows and columns.
      memory: of the peak bandwidth of the main memory, what copies and sums reach.
      cores: of a chip, which share the heads of attention.
    """

    clock: float
    width: int
    memory: float
    cores: int


_RATES = {
    "v5p": Rates(clock=1.75e9, width=128, memory=0.85, cores=2),
    "v5e": Rates(clock=1.5e9, width=128, memory=0.90, cores=1),
    "v6e": Rates(clock=1.75e9, width=256, memory=0.90, cores=1),
}

# Kernels that are no HLO, by their names: a core's cycles of a block of attention, BLOCK x BLOCK,
# of a head of HEAD or less, on v5p; those of other chips, whose matrix units differ, are taken to
# need as many. From a head of 2,048 tokens, causal: 3 blocks.
HEAD = 128
_KERNELS = {
    re.compile(r"splash_\w*dkv"): 35300 / 3,  # with the gradient of queries, if that is fused
    re.compile(r"splash_\w*dq"): 18300 / 3,  # taken to cost what forward costs
    re.compile(r"splash_\w*fwd"): 18300 / 3,
}


def of(chip: Chip) -> Rates | None:
    """None for a chip whose rates nobody has looked up."""
    named = (rates for name, rates in _RATES.items() if CHIPS[name].kinds == chip.kinds)
    return next(named, None)


def block_cycles(kernel: str) -> float | None:
    """A core's cycles of a block of attention in a kernel, by its name; None for other kernels."""
    return next((cycles for name, cycles in _KERNELS.items() if name.search(kernel)), None)
