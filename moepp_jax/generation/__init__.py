"""Generation: prompts in, text out.

`Generator` takes token ids to token ids; `Reader` takes those to text and ends it at stop strings.
What runs on the device is `decode`, made of `layers` and `sampling`; `programs` compiles it for a
few sizes, to which `batch` pads what comes.
"""

from moepp_jax.generation.generator import Generator
from moepp_jax.generation.programs import Speed
from moepp_jax.generation.text import Reader

__all__ = ["Generator", "Reader", "Speed"]
