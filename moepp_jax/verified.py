"""Whether the steps of a run are as they were saved: what was read of them, and what is allowed."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

import jax

from moepp_jax import checksums, processes
from moepp_jax.storage import AnyPath

_ONLY_VERIFIED = contextvars.ContextVar("only_verified", default="")


@contextlib.contextmanager
def only_verified(asked: str = "strict") -> Iterator[None]:
    """Checkpoints that are opened in this context give nothing that cannot be verified.

    Args:
      asked: how that was asked for, as an error says it; "": it was not, and they give all.
    """
    before = _ONLY_VERIFIED.set(asked)
    try:
        yield
    finally:
        _ONLY_VERIFIED.reset(before)


class Verifier:
    """Verifies steps; what was found intact is not read again. Every process makes each call.

    Args:
      folder: of the checkpoints.

    Attributes:
      strict: how it was asked for to refuse what cannot be verified; "": it is given.
    """

    def __init__(self, folder: AnyPath):
        self.strict = _ONLY_VERIFIED.get()
        self._folder = folder
        self._intact: dict[int, frozenset[str]] = {}  # items, by step
        self._doubted: set[int] = set()

    def verdict(self, step: int, items: Iterable[str]) -> checksums.Verdict:
        """What is wrong with a step's files. Each process reads a share, all return alike."""
        items, folder = frozenset(items), self._folder / str(step)
        if items <= self._intact.get(step, frozenset()):
            return checksums.Verdict()
        share = checksums.Share(jax.process_index(), jax.process_count())

        def mine() -> str:
            # A model that was converted has no `rest`.
            found = checksums.verdict(folder, items, items - {"rest"}, share)
            return "\n".join(" ".join((said or "").split()) for said in found)

        told = [said.partition("\n") for said in processes.of_each(mine)]
        damages, _, doubts = zip(*told, strict=True)
        found = checksums.Verdict(*(next(filter(None, said), None) for said in (damages, doubts)))
        if not any(found):
            self._intact[step] = items | self._intact.get(step, frozenset())
        return found

    def forget(self, step: int) -> None:
        """It is saved anew."""
        self._intact.pop(step, None)

    def is_first_doubt(self, step: int) -> bool:
        """Whether nothing was said yet of this step, which cannot be verified."""
        said = step in self._doubted
        self._doubted.add(step)
        return not said
