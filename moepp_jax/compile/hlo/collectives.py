"""Every collective of a program: its bytes, its groups, how often it runs, what runs meanwhile."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moepp_jax.compile.hlo.loops import executions
from moepp_jax.compile.hlo.text import Computation, Instruction, Module

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


# An asynchronous collective fusion is a chain: it stands in the fusion that starts it, in each that
# computes something meanwhile, and in the one that waits for it.
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_START, _DONE = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'

# Between TPU slices a collective is a transfer through the hosts, by the name of what it does.
_ACROSS_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclass(frozen=True, eq=False)
class Collective:
    """One collective instruction.

    Attributes:
      operand_bytes: what one device puts in: of a ragged one the rows that are filled, if
        `Module.load` tells, or else the whole of their buffer.
      groups: (groups, devices of a group): positions in the flattened mesh. Of a permutation the
        pairs (from, to).
      times: how often a run of the program executes it.
      asynchronous: other instructions can run between its start and its end.
      scope: where it comes from in the traced program.
    """

    kind: str
    name: str
    computation: str
    operand_bytes: int
    types: tuple[str, ...]
    groups: np.ndarray
    times: int
    asynchronous: bool
    scope: str

    @property
    def group_size(self) -> int:
        return self.groups.shape[1]

    @property
    def result_bytes(self) -> float:
        factor = {"all-gather": self.group_size, "reduce-scatter": 1 / self.group_size}
        return float(self.operand_bytes * factor.get(self.kind, 1))

    @property
    def wire_bytes(self) -> float:
        """What one execution sends from each device, by the ring algorithms."""
        n = self.group_size
        share = {
            "all-gather": n - 1,
            "reduce-scatter": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }
        return float(self.operand_bytes * share[self.kind])

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes that it runs over: those along which devices of a group differ."""
        places = np.stack(np.unravel_index(self.groups, tuple(mesh_shape.values())))
        differ = (places != places[:, :, :1]).any(axis=(1, 2))
        return tuple(name for name, d in zip(mesh_shape, differ, strict=True) if d)


def collectives(module: Module) -> list[Collective]:
    """All collectives that run, in the order of the text."""
    times = executions(module)
    wrapped = module.called_by("async-start")
    chains = _chains(module)
    return [
        _collective(module, computation, instruction, kind, times, name in wrapped)
        for name, computation in module.computations.items()
        if name in times
        for instruction, kind in _of(computation)
        if (chain := _chain(instruction)) not in chains or chains[chain] == instruction.name
    ]


def _chain(instruction: Instruction) -> str | None:
    found = _CHAIN.search(instruction.attributes)
    return found[1] if found else None


def _chains(module: Module) -> dict[str | None, str]:
    """Of each chain the collective that is started."""
    return {
        _chain(instruction): instruction.name
        for computation in module.computations.values()
        for instruction, _ in _of(computation)
        if _chain(instruction) and _leads_to(computation, instruction, _START)
    }


def _leads_to(computation: Computation, instruction: Instruction, target: str) -> bool:
    users = computation.users.get(instruction.name, ())
    return any(user.attribute("custom_call_target") == target for user in users)


def overlapped(module: Module, kind: str) -> list[tuple[str, Instruction, list[Instruction]]]:
    """Asynchronous collectives of a kind: (computation, start, what is scheduled until done)."""
    found = []
    for computation in module.computations.values():
        order = {i.name: at for at, i in enumerate(computation.instructions)}
        for start, done in [*_pairs(module, computation, kind), *_ends(module, computation, kind)]:
            between = computation.instructions[order[start.name] + 1 : order[done.name]]
            found.append((computation.name, start, between))
    return found


def _pairs(
    module: Module, computation: Computation, kind: str
) -> Iterator[tuple[Instruction, Instruction]]:
    for done in computation.instructions:
        if done.opcode in (f"{kind}-done", "async-done"):
            start = computation.by_name[done.operands[0]]
            if start.opcode != "async-start" or _wraps(module, start, kind):
                yield start, done


def _ends(
    module: Module, computation: Computation, kind: str
) -> Iterator[tuple[Instruction, Instruction]]:
    """The fusions that start chains, and those that wait for them."""
    started: dict[str | None, Instruction] = {}
    for fusion in computation.instructions:
        if fusion.opcode != "fusion":
            continue
        inner = module.computations[fusion.called["calls"][0]]
        for collective, its_kind in _of(inner):
            chain = _chain(collective)
            if its_kind == kind and _leads_to(inner, collective, _START):
                started[chain] = fusion
            elif chain in started and _leads_to(inner, collective, _DONE):
                yield started[chain], fusion


def awaited(module: Module, computation: Computation) -> dict[str, Instruction]:
    """Of each instruction that waits for an asynchronous one, the one that started it."""
    found = {}
    for done in computation.instructions:
        if done.opcode.endswith("-done"):
            start = computation.by_name[done.operands[0]]
            while start.opcode.endswith("-update"):
                start = computation.by_name[start.operands[0]]
            found[done.name] = start
    for kind in KINDS:
        found |= {done.name: start for start, done in _ends(module, computation, kind)}
    return found


def _wraps(module: Module, start: Instruction, kind: str) -> bool:
    called = module.wrapped_in(start)
    return any(k == kind for name in called for _, k in _of(module.computations[name]))


def _of(computation: Computation) -> Iterator[tuple[Instruction, str]]:
    for instruction in computation.instructions:
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "send" and (
            across := _ACROSS_SLICES.search(instruction.attributes)
        ):
            kind = across[1].lower().replace("_", "-")
        if kind in KINDS:
            yield instruction, kind


def _collective(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    kind: str,
    times: Mapping[str, int],
    wrapped: bool,
) -> Collective:
    sends = instruction.opcode == "send"  # of an array and a token
    ragged = kind == "ragged-all-to-all"
    operands = instruction.operands[:1] if sends or ragged else instruction.operands
    shapes = [s for name in operands for s in computation.by_name[name].shapes]
    filled = 1.0
    if ragged and module.load:
        filled = min(1.0, module.load.rows / shapes[0].dims[0])
    return Collective(
        kind=kind,
        name=instruction.name,
        computation=computation.name,
        operand_bytes=int(filled * sum(s.bytes for s in shapes)),
        types=tuple(sorted({s.type for s in shapes})),
        groups=_groups(instruction, module.num_devices),
        times=times[computation.name],
        asynchronous=wrapped
        or sends
        or instruction.opcode.endswith("-start")
        or _leads_to(module.computations[computation.name], instruction, _START),
        scope=instruction.scope,
    )


def _groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """The device groups, written out, as an iota, or as axes of a mesh of the compiler's own."""
    text = instruction.attributes
    if target := re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"', text):
        # A device and its counterparts in the other slices, which follow each other in the mesh.
        slices, devices = len(_numbers(target[1])), int(target[2]) + 1
        return np.arange(slices * devices).reshape(slices, devices).T
    if pairs := re.search(r"source_target_pairs=\{([\d{},\s]*)\}", text):
        return _listed(pairs[1])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text
    ):
        return _of_mesh(*mesh.groups(), num_devices)
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[1])
    listed = re.search(r"replica_groups=\{([\d{},\s]*)\}", text)
    if listed and listed[1]:
        return _listed(listed[1])
    return np.arange(num_devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _listed(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in re.findall(r"\{([^}]*)\}", text)])


def _iota(text: str) -> np.ndarray:
    """[groups,size]<=[dims]T(order): the numbers in order, laid out, transposed and cut anew."""
    shape, rest = text.split("<=")
    return _ordered(rest).reshape(_numbers(shape))


def _ordered(text: str) -> np.ndarray:
    dims, _, order = text.partition("T")
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return numbers.transpose(_numbers(order)) if order else numbers


def _of_mesh(axes: str, ids: str | None, over: str, num_devices: int) -> np.ndarray:
    """The devices that differ along the named axes: 'name', or 'name':(before)size for a part."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    numbers = _ordered(ids) if ids else np.arange(num_devices)
    dims: list[int] = []
    chosen: list[int] = []
    for name, size in sizes.items():
        cuts = {1, size}
        mine = [(int(b or 1), int(s or size)) for n, b, s in parts if n == name]
        for before, part in mine:
            cuts |= {before, before * part}
        edges = sorted(cuts)
        for low, high in pairwise(edges):
            if any(b <= low and high <= b * s for b, s in mine):
                chosen.append(len(dims))
            dims.append(high // low)
    others = [d for d in range(len(dims)) if d not in chosen]
    size = math.prod(dims[d] for d in chosen)
    return numbers.reshape(dims).transpose(*others, *chosen).reshape(-1, size)
