"""Checkpoints of a run: saved in the background, verified by checksum, restored onto any mesh.

Orbax writes and restores the arrays; this room adds what it leaves to its user. Of a step's folder
`params/` holds the parameters, `rest/` the optimizer state and whatever else a training state has,
`meta/` the shapes and the metrics, and `checksums.json` the sums of every file in these three:
without it a flipped byte would restore silently. Each process sums up the files that it wrote, the
first one what orbax makes of them, before orbax commits the step, in its background thread, so a
step is never there without them. Before a step is used each process reads its share of the bytes.
One that has lost them, or is of a version that wrote none, cannot be verified: it is used where
there is no other, which is said, and refused `only_verified` (see `verified`).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.serialization import from_state_dict, to_state_dict

from moepp_jax import checksums, regular
from moepp_jax.steps import ITEMS, CheckpointError, SaveError, Steps, caution
from moepp_jax.storage import AnyPath, is_local, open_path
from moepp_jax.verified import Verifier

__all__ = ["CheckpointError", "Checkpoints", "SaveError"]


class Checkpoints:
    """The checkpoints in a run's folder; every process of the run opens them and makes each call.

    A state is a pytree with a mapping or dataclass on top whose `params` are the parameters. The
    abstract ones are of jax.ShapeDtypeStruct, each with the sharding that the array shall get.

    Args:
      workdir: the run's folder, on a disk or in a store that all processes see.
      keep: how many of the newest steps are kept, beside the one of the lowest eval_loss.
      handlers: orbax's registry of handlers, for `save_params`; by default its own.

    Raises:
      CheckpointError: the folder cannot be read, or something else is in its place.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, handlers: Any = None):
        folder = open_path(workdir)
        self._folder = (folder.absolute() if is_local(folder) else folder) / "checkpoints"
        self._verifier = Verifier(self._folder)
        self._steps = Steps(self._folder, keep, handlers)
        self._policy = self._steps.policy
        for step in self.steps():
            self._policy.note(step, _metrics(self._folder / str(step)))

    def save(self, step: int, state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Starts to save a step; a step that is there already, and not damaged, stays as it is.

        Raises:
          SaveError: it cannot be written, or the one before could not.
        """
        self.wait()
        if step in self.steps():
            if step not in self._policy.damaged:
                return
            self._steps.remove(step)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        items = _split(state)
        meta = {"metrics": metrics, "shapes": _shapes(items)}
        self._verifier.forget(step)
        self._policy.note(step, metrics)
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._steps.save(step, {"meta": ocp.args.JsonSave(meta)} | saved, _bytes_here(items))

    def save_params(self, step: int, params: Any) -> None:
        """Starts to save a step of parameters alone, of leaves that `handlers` can write."""
        meta = {"metrics": {}, "shapes": _shapes({"params": params})}
        items = {"meta": ocp.args.JsonSave(meta), "params": ocp.args.PyTreeSave(params)}
        self._steps.save(step, items)

    def steps(self) -> list[int]:
        """In ascending order; one that is being saved is among them."""
        return self._steps.numbers()

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the lowest eval_loss; None if none was saved with one."""
        return self._policy.best(self.steps())

    def choose(self, step: int | None) -> int | None:
        """This step if one is named, else the best, else the newest; None if there is none.

        Steps without checksums are chosen only where no other is.
        """
        if step is not None:
            return step
        steps = self.steps()
        summed = [s for s in steps if self._is_summed_up(s)] or steps
        best, of_all = self._policy.best(summed), self._policy.best(steps)
        if of_all not in (best, *summed):
            caution(f"the best checkpoint, {of_all}, cannot be verified: --step takes it")
        return max(summed, default=None) if best is None else best

    def _is_summed_up(self, step: int) -> bool:
        """Whether there is a sum of each of its files; whether they are right is not looked at."""
        folder = self._folder / str(step)
        doubt = checksums.listed(folder, ITEMS, ("params", "meta")).doubt
        return checksums.are_there(folder) and doubt is None

    def latest_intact_step(self, report: Callable[[str], Any] = print) -> int | None:
        """The newest step whose files are as they were saved; None if nothing was saved yet.

        What is damaged is reported, and goes when a newer step is saved. A step that cannot be
        verified is taken where none can.

        Raises:
          CheckpointError: there are checkpoints, and all are damaged, or none can be verified and
            that is asked for.
        """
        self.wait()
        doubts = {}
        for step in reversed(self.steps()):
            damage, doubt = self._verifier.verdict(step, ITEMS)
            if damage is None and doubt is None:
                self._policy.damaged |= doubts.keys()
                return step
            if damage is None:
                doubts[step] = doubt
                report(f"checkpoint {step} cannot be verified, looking for an older one: {doubt}")
            else:
                self._policy.damaged.add(step)
                report(f"checkpoint {step} is damaged, looking for an older one: {damage}")
        if doubts:
            step = max(doubts)
            self._require_allowed(step, doubts[step], report)
            return step
        if self.steps():
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged: remove that folder to start anew"
            )
        return None

    def restore(self, step: int | None, abstract_state: Any, optional: Iterable[str] = ()) -> Any:
        """The state of a step.

        Args:
          optional: parts of the state that earlier versions did not save; where the checkpoint
            lacks them, they stay abstract.

        Raises:
          CheckpointError: the step is not there, is damaged, or is of another architecture.
        """
        items = _split(abstract_state)
        lacking = {n: items["rest"].pop(n) for n in optional if not self._has(step, n)}
        items = self._read(step, items)
        fields = lacking | items["rest"] | {"params": items["params"]}
        return from_state_dict(abstract_state, fields)

    def restore_params(self, step: int | None, abstract_params: Any) -> Any:
        """The parameters of a step alone; no other array is read. Raises as `restore` does."""
        items = self._read(step, {"params": to_state_dict(abstract_params)})
        return from_state_dict(abstract_params, items["params"])

    def has_only_params(self, step: int) -> bool:
        """Whether a step is of a model that was converted, which has no optimizer state yet."""
        return not any(name.startswith("rest/") for name in self._saved_shapes(step))

    def _saved_shapes(self, step: int | None) -> dict[str, Any]:
        """The shapes of all that was saved at a step, by name."""
        try:
            return dict(_meta(self._folder / str(step))["shapes"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = regular.why(error)
            raise self._error(step, f"cannot be read: meta/metadata: {why}") from error

    def _has(self, step: int | None, part: str) -> bool:
        """Whether a state that was saved has this part."""
        self._require_there(step)
        self._require_intact(step, ["meta"])
        return any(name.startswith(f"rest/{part}/") for name in self._saved_shapes(step))

    def checksum(self, step: int | None) -> str:
        """One checksum of all that was saved at a step.

        Raises:
          CheckpointError: the step is not there, or what it says of itself is damaged.
        """
        self._require_there(step)
        self._require_intact(step, ["meta"])
        return checksums.of_all(self._folder / str(step))

    def params_folder(self, step: int | None, abstract_params: Any) -> AnyPath:
        """Where a step's parameters lie, if they are intact. Raises as `restore` does."""
        self._verify(step, {"params": to_state_dict(abstract_params)})
        return self._folder / str(step) / "params"

    def wait(self) -> None:
        """Until nothing is being saved.

        Raises:
          SaveError: what is being saved cannot be written.
        """
        self._steps.wait()

    def look_again(self) -> None:
        """At which steps there are, where another process may have failed to save one."""
        self._steps.look_again()

    def close(self) -> None:
        """
        Raises:
          SaveError: what is being saved cannot be written.
        """
        self._steps.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._steps.leave(error[0])

    def _read(self, step: int | None, items: dict[str, Any]) -> dict[str, Any]:
        self._verify(step, items)
        targets = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        try:
            return self._steps.restore(step, targets)
        except Exception as error:  # orbax raises bare ones
            said = str(error).partition(" See full TensorStore details")[0]
            raise self._error(step, f"cannot be read: {said}") from error

    def _verify(self, step: int | None, items: dict[str, Any]) -> None:
        self._require_there(step)
        self._require_intact(step, ["meta"])
        self._require_shapes(step, items)
        doubt = self._require_intact(step, items)
        if doubt is not None:
            self._require_allowed(step, doubt, caution)

    def _require_there(self, step: int | None) -> None:
        self.wait()
        if not self.steps():
            raise CheckpointError(f"there is no checkpoint in {self._folder}: training writes them")
        if step not in self.steps():
            raise self._error(step, "is not there")

    def _require_intact(self, step: int, items: Iterable[str]) -> str | None:
        """Returns why nobody knows whether it is, if so."""
        damage, doubt = self._verifier.verdict(step, items)
        if damage is not None:
            raise self._error(step, f"is damaged: {damage}")
        return doubt

    def _require_allowed(self, step: int, doubt: str, report: Callable[[str], Any]) -> None:
        if asked := self._verifier.strict:
            raise self._error(step, f"cannot be verified: {doubt}; without {asked} it is used")
        if self._verifier.is_first_doubt(step):
            report(
                f"checkpoint {step} in {self._folder} cannot be verified, as {doubt}; it is used "
                "as it is (--strict would refuse it, and load(strict=True))"
            )

    def _require_shapes(self, step: int, items: dict[str, Any]) -> None:
        saved = self._saved_shapes(step)
        saved = {name: shape for name, shape in saved.items() if name.split("/")[0] in items}
        wanted = _shapes(items)
        lines = [
            f"  {name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if lines:
            more = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
            raise CheckpointError(
                f"checkpoint {step} in {self._folder} is of another architecture; these shapes "
                "differ:\n" + "\n".join(lines[:5] + more)
            )

    def _error(self, step: int | None, why: str) -> CheckpointError:
        others = ", ".join(str(other) for other in self.steps() if other != step)
        there = f"; steps that may be used instead: {others}" if others else ""
        return CheckpointError(f"checkpoint {step} in {self._folder} {why}{there}")


def _bytes_here(tree: Any) -> int:
    """Of the parts of arrays that this process has, each once."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return sum(s.data.nbytes for a in leaves for s in a.addressable_shards if s.replica_id == 0)


def _split(state: Any) -> dict[str, Any]:
    """The state as nested dictionaries, which can be read without its classes, in two items."""
    rest = to_state_dict(state)
    return {"params": rest.pop("params"), "rest": rest}


def _shapes(items: dict[str, Any]) -> dict[str, list[int]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
    }


def _meta(folder: AnyPath) -> dict[str, Any]:
    return regular.read_json(folder / "meta" / "metadata")


def _metrics(folder: AnyPath) -> dict[str, float]:
    try:
        return dict(_meta(folder)["metrics"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # damaged: an error for who restores this step, not for who opens the run
