"""Kernels that are no HLO: what the compiler hands to a library or to a kernel of one's own.

What such a call computes stands in its `backend_config`. XLA's own fusions by Triton are none of
these: their inside is HLO, and counted as such.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from moepp_jax.compile.hlo import grouped
from moepp_jax.compile.hlo.text import Computation, Instruction, Load, Shape

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_MATMULS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
_ATTENTION = "__cudnn$fmha"
_TRITON = "__gpu$xla.gpu.triton"
_MOSAIC = "tpu_custom_call"
_SPLASH = re.compile(r"splash_\w*?_(fwd|dkv|dq)")

# They multiply no matrices: sorting, choosing the largest, memory, notes to the compiler.
_NO_PRODUCTS = re.compile(
    r"__cub\$|__gpu\$TopK|AllocateBuffer|Sharding|SPMD|annotate_device_placement|Barrier|Pin|Unpin"
)


def target(instruction: Instruction) -> str | None:
    """What a custom call calls; None for every other instruction."""
    if instruction.opcode != "custom-call":
        return None
    found = _TARGET.search(instruction.attributes)
    return found[1] if found else None


def kernel(instruction: Instruction) -> str | None:
    """Whose kernel computes a custom call's products, in words; None if it is known to have none.

    A kernel that cannot be read (`product` is None) goes by its own name, if it has one.
    """
    name = target(instruction)
    if name is None or _NO_PRODUCTS.match(name):
        return None
    if name in _MATMULS:
        return "cuBLAS"
    if name.startswith(_ATTENTION):
        return "cuDNN attention"
    if name == _TRITON:
        return f"Triton kernel {_own_name(instruction)}".rstrip()
    return name


def is_grouped(instruction: Instruction) -> bool:
    """Whether it is a kernel over rows sorted by expert that `grouped` can read."""
    own = target(instruction) in (_TRITON, _MOSAIC)
    return own and grouped.is_known(_own_name(instruction))


def product(
    computation: Computation, instruction: Instruction, load: Load | None = None
) -> int | None:
    """Operations of a custom call's matrix products; None if they are not in the text.

    Args:
      load: of `Module`.
    """
    name = target(instruction)
    if is_grouped(instruction):
        return grouped.flops(computation, instruction, load)
    if name in _MATMULS:
        return _of_matmul(computation, instruction)
    if name and name.startswith(_ATTENTION):
        return _of_attention(computation, instruction, backward=name.endswith("Backward"))
    if name and _SPLASH.match(instruction.name):
        return _of_splash(computation, instruction)
    return None


def arithmetic(computation: Computation, instruction: Instruction) -> str:
    """The type of a custom call's factors; `tf32` for float32 that may be rounded to it."""
    if is_grouped(instruction):
        return grouped.factors(computation, instruction)  # float32 is multiplied as such
    types = [computation.by_name[name].shapes[0].type for name in instruction.operands[:2]]
    return rounded(types, instruction)


def rounded(types: list[str], instruction: Instruction) -> str:
    """In which arithmetic a product of two such factors is made."""
    if "f32" not in types:
        return types[0]
    return "f32" if precision(instruction) == "highest" else "tf32"


def traffic(computation: Computation, instruction: Instruction, load: Load | None) -> int | None:
    """Bytes that a custom call moves, where that is not all that it is given and makes."""
    if not is_grouped(instruction):
        return None
    return grouped.traffic(computation, instruction, _own_name(instruction), load)


def attended(computation: Computation, instruction: Instruction) -> int:
    """Pairs of a query and a key, of all heads, in the blocks that a splash kernel computes.

    Its first operand says of each block of queries (or of keys) which one it meets next: its sides
    are all blocks of the sequence, and as many as one meets at most. Of these a causal mask leaves
    the first i + 1 to the i-th. The largest operand is (heads, tokens, width), whatever comes
    before it.
    """
    _, *sides = computation.by_name[instruction.operands[0]].shapes[0].dims
    *heads, tokens, _ = _queries(computation, instruction).dims
    blocks = sum(min(i + 1, min(sides)) for i in range(max(sides)))
    return math.prod(heads) * blocks * (tokens // max(sides)) ** 2


def head_width(computation: Computation, instruction: Instruction) -> int:
    """Numbers of a query, in a splash kernel."""
    return _queries(computation, instruction).dims[-1]


def precision(instruction: Instruction) -> str:
    """How exactly operands are multiplied, of two the more exact one: default, high, highest."""
    config = re.search(r'"operand_precision":\[([^\]]*)\]', instruction.attributes)
    attribute = re.search(r"operand_precision=\{([^}]*)\}", instruction.attributes)
    said = re.findall(r"\w+", (config or attribute or ("", ""))[1].lower())
    return next((name for name in ("highest", "high") if name in said), "default")


def workspace_bytes(instruction: Instruction) -> int:
    """Of the buffer that a library's kernel is given beside its results, and may leave unused."""
    name = target(instruction)
    if name not in _MATMULS and not (name or "").startswith(_ATTENTION):
        return 0
    *results, last = instruction.shapes
    return last.stored if results and last.type in ("s8", "u8") else 0


def _of_matmul(computation: Computation, instruction: Instruction) -> int:
    left = computation.by_name[instruction.operands[0]].shapes[0]
    contracted = _numbers(instruction, "lhs_contracting_dimensions")
    return 2 * instruction.shapes[0].size * math.prod(left.dims[axis] for axis in contracted)


def _of_attention(computation: Computation, instruction: Instruction, backward: bool) -> int:
    """Forward makes two products of (L, L) with the heads' width; backward these scores again,
    and four gradients. Of a causal mask's half that is masked nothing is computed, as far as whole
    blocks go: this counts to the diagonal.
    """
    queries = computation.by_name[instruction.operands[0]].shapes[0]
    *heads, rows, columns = _scores(instruction)
    pairs = rows * columns
    if "CAUSAL" in _word(instruction, "mask_type"):
        pairs = pairs // 2 + rows // 2
    if window := _numbers(instruction, "sliding_window_length"):
        pairs = min(pairs, rows * window[0]) if window[0] else pairs
    return (5 if backward else 2) * 2 * math.prod(heads) * pairs * queries.dims[-1]


def _of_splash(computation: Computation, instruction: Instruction) -> int:
    """Forward makes two products; backward the scores and theirs, and one for each gradient."""
    queries = _queries(computation, instruction)
    kind = _SPLASH.match(instruction.name)[1]
    gradients = sum(shape.dims[-2:] == queries.dims[-2:] for shape in instruction.shapes)
    products = 2 if kind == "fwd" else 2 + gradients
    return products * 2 * attended(computation, instruction) * queries.dims[-1]


def _queries(computation: Computation, instruction: Instruction) -> Shape:
    operands = (computation.by_name[name] for name in instruction.operands)
    return max((shape for operand in operands for shape in operand.shapes), key=lambda s: s.size)


def _scores(instruction: Instruction) -> tuple[int, ...]:
    """The shape of the attention's scores, (B, H, L, L)."""
    shape = instruction.attributes.partition('"intermediate_tensor_shape"')[2]
    return tuple(_integers(re.search(r'"dimensions":\s*\[([^\]]*)\]', shape)[1]))


def _numbers(instruction: Instruction, name: str) -> list[int]:
    """A field of the configuration that is a number or a list of them."""
    found = re.search(rf'"{name}":\s*(\[[^\]]*\]|[-\d]+)', instruction.attributes)
    return list(_integers(found[1])) if found else []


def _word(instruction: Instruction, name: str) -> str:
    found = re.search(rf'"{name}":\s*"([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _integers(text: str) -> Iterable[int]:
    return map(int, re.findall(r"-?\d+", text))


def _own_name(instruction: Instruction) -> str:
    """The name that a kernel was given: on GPU the scope before that of the call itself."""
    if target(instruction) == _TRITON:
        return (instruction.scope.split("/")[-2:-1] or [""])[0]
    return re.sub(r"[.\d]+$", "", instruction.name)
