"""This layer beside those of others, on the same tokens and weights, in one process, interleaved.

    python -m benchmarks.peers [--json FILE] [--figure STEM] [--rounds N]

Layers are of four kinds; those of a kind do the same arithmetic, so their outputs and the gradients
of their tokens must be equal, which is asserted before anything is timed:

  vanilla             softmax, top-2, gates over their sum, nothing dropped
  vanilla, capacity   the same with slots for 1.1 times the load; what finds none is dropped
  moepp               MoE++ at the balance of tau, the zero expert's gate left out of the sum
  identity            as many copy experts as MoE++ has others; raw gates, times 6 (LongCat-Flash)

PyTorch and transformers are the extra `hf`; without them their layers are left out, and a line says
so. PyTorch has as many threads as there are processors, as XLA has.
"""
