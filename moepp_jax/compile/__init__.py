"""The training step compiled for devices that are not there: `step.run` is the command.

step      compiles it, and says whether it fits
topology  the devices, by name: v5p:4x4x4, h100:8x8, cpu:8
gpu       the cards that can be compiled for, and how
hlo       reads the compiled program: collectives, products, kernels, loops, what overlaps
traffic   the least bytes that the scheme of sharding moves
roofline  bounds of a step's time from a chip's published peak figures; `switched` those of GPUs
findings  all of these as one report, which `tables` prints
remedies  what to change where it does not fit

evaluation, generation  whether those fit there as well; `memory` asks the compiler

With --profile, the time of a step by part:

scheduled  compiles it as far as its schedule, in the process `child`, which is then ended
needs      what each instruction needs of the chip, at the rates of `rates`
timeline   one after the other, links and copies beside them
parts      which part of the model an instruction belongs to
profile    what follows, for JSON; `figure` draws it
"""

from moepp_jax.compile.step import describe, examine, run

__all__ = ["describe", "examine", "run"]
