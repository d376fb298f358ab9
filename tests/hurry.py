"""Options with which XLA compiles in a hurry: a third of the time, for the same sums.

For tests, and for the processes that they start.
"""

import jaxlib

XLA_FLAGS = "--xla_backend_optimization_level=0"
# XLA ends a process that gives it an option it has no more.
if jaxlib.version.__version_info__ < (0, 11):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
