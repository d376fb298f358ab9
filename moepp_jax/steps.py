"""The steps in the folder of a run's checkpoints: orbax saves, lists and restores them.

This room adds what orbax leaves to its user: nothing half-written stays, all processes hear of what
one cannot write, each in one error, and every file is summed up before its step is there.
"""

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moepp_jax import checksums, processes, regular, summed
from moepp_jax.retention import NewestAndBest
from moepp_jax.storage import AnyPath, is_full, is_local, reason, room

ARRAYS = ("params", "rest")
ITEMS = (*ARRAYS, "meta")

# Inodes that are enough for any step.
_MANY = 100_000

# Attempts, a tenth of a second apart.
_REMOVALS = 20


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged or is of another model; the message says which."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written; the message says why, and which ones there are.

    Attributes:
      STATUS: with which a command ends for it: an error of input or output, as sysexits.h has it.
    """

    STATUS = 74


class Steps:
    """The steps in a folder; every process of the run opens them and makes each call.

    Args:
      folder: may be none yet.
      keep: how many of the newest steps are kept, beside the one of the lowest eval_loss.
      handlers: orbax's registry of handlers; by default its own, of which each process sums up what
        it writes.

    Attributes:
      policy: which steps are kept; what it knows of them is noted by who opens them.

    Raises:
      CheckpointError: the folder cannot be read, or something else is in its place.
    """

    def __init__(self, folder: AnyPath, keep: int, handlers: Any = None):
        self._folder = folder
        self.policy = NewestAndBest(keep)
        self._saving: int | None = None
        self._bytes = 0  # that it takes at most, of this process
        self._failure: Exception | None = None  # why this process has not written its part
        self._is_summed = handlers is None  # by each process, as it is written
        self._require_folder()
        try:
            self._require_regular_metadata()
            self._manager = _Manager(
                folder,
                handler_registry=handlers
                or summed.handlers(ARRAYS, self._sum_own, self._hear_of_failure),
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    save_root_metadata=False,
                    preservation_policy=self.policy,
                    async_options=ocp.AsyncOptions(
                        post_finalization_callback=self._write_checksums,
                        barrier_sync_fn=summed.barrier(),
                    ),
                ),
            )
        # The others of metadata that orbax takes for JSON as it writes it.
        except (OSError, RecursionError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(f"{folder} cannot be read: {reason(error)}") from error

    def _require_folder(self) -> None:
        """Steps that only seem not to be there must not be replaced by a new beginning."""
        if not is_local(self._folder) or self._folder.is_dir():
            return
        if self._folder.is_symlink():
            raise CheckpointError(
                f"{self._folder} is a link to {os.readlink(self._folder)}, which is no folder: "
                "mount the disk where the checkpoints are, or remove the link to start anew"
            )
        if self._folder.exists():
            raise CheckpointError(f"{self._folder} is no folder: a run keeps its checkpoints there")

    def _require_regular_metadata(self) -> None:
        """Of what orbax reads of the newest step before its sums are looked at."""
        if not is_local(self._folder) or not self._folder.is_dir():
            return
        there = self._folder.iterdir()
        steps = [entry for entry in there if entry.name.isdigit() and entry.is_dir()]
        newest = max(steps, key=lambda entry: int(entry.name), default=None)
        if newest is not None:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                regular.require(newest / "_CHECKPOINT_METADATA", regular.SMALL)

    def numbers(self) -> list[int]:
        """In ascending order; one that is being saved is among them."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: Mapping[str, Any], size: int = 0) -> None:
        """Starts to save a step, when nothing is being saved.

        Args:
          items: what orbax is to save, by name.
          size: bytes that this process may write; 0 if nobody knows.

        Raises:
          SaveError: it cannot be written.
        """
        self._saving, self._bytes = step, size
        self._remove_leftovers()
        with self._telling():
            self._require_folders()
            # Forced: orbax would silently skip a step before a damaged one.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _require_folders(self) -> None:
        """The first process can make those of a step, and its files; all hear of it if not.

        Orbax makes folders beside other work: if it cannot, all wait for them for five minutes.
        """
        if jax.process_count() == 1 or not is_local(self._folder):
            return

        def tried() -> str:
            probe = self._folder / f"probe{ocp.path.atomicity.TMP_DIR_SUFFIX}"
            try:
                if jax.process_index() == 0:
                    for item in ITEMS:
                        (probe / item / "d").mkdir(parents=True)
                    shutil.rmtree(probe)
                    self._require_inodes()
            except OSError as error:
                return self._why(error)
            return ""

        why = processes.of_each(tried)[0]
        if why:
            raise OSError(why)

    def _require_inodes(self) -> None:
        """As many as the newest step has, where the disk counts them and few are left."""
        disk = os.statvfs(self._folder)
        if not disk.f_files or disk.f_favail > _MANY:
            return
        newest = max(self.numbers(), default=None)
        there = [] if newest is None else [*(self._folder / str(newest)).rglob("*")]
        needed = max(len(there), 16 * (1 + jax.process_count()))
        if disk.f_favail < needed:
            said = f"{os.strerror(errno.ENOSPC)} for {needed} files, but for {disk.f_favail}"
            raise OSError(errno.ENOSPC, said)

    def remove(self, step: int) -> None:
        """By the first process; all others hear of it if it fails."""
        folder = epath.Path(self._folder / str(step))

        def remove() -> str:
            try:
                if jax.process_index() == 0:
                    folder.rmtree()
            except OSError as error:
                return reason(error)
            return ""

        why = processes.of_each(remove)[0]
        self._manager.reload()
        if why:
            raise SaveError(
                f"checkpoint {step} in {self._folder} cannot be used, nor be removed to be saved "
                f"again: {why}; remove it by hand"
            )

    def restore(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """What orbax is to restore, by name; it raises what it likes."""
        return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())

    def wait(self) -> None:
        """Until nothing is being saved.

        Raises:
          SaveError: what is being saved cannot be written.
        """
        with self._telling():
            failed = None
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                failed = error
            # Of both this is the cause, and in a process that is not the first it is alone.
            failed, self._failure = self._failure or failed, None
            if failed is not None:
                raise failed

    def look_again(self) -> None:
        """At which steps there are, where another process may have failed to save one."""
        self._manager.reload()

    def close(self) -> None:
        """
        Raises:
          SaveError: what is being saved cannot be written.
        """
        self.wait()  # in every process: orbax would tell the first one alone
        self._manager.close()

    def leave(self, error: type[BaseException] | None) -> None:
        """Closes them, where nobody would wait for ever; an error that ended their use is told."""
        # A process that fails would wait here for the others, which wait for it; and who waits for
        # a save that cannot be finished may wait for ever.
        if error is None:
            self.close()
        elif jax.process_count() == 1 and not issubclass(error, SaveError):
            try:
                self.close()
            except Exception:  # of a save that fails too; the first one is told
                self._remove_leftovers(looks=5)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What goes wrong in saving, as one error; nothing of the step is left behind."""
        try:
            yield
        except Exception as error:  # orbax and TensorStore raise bare ones
            why = self._why(error)
            self._manager.reload()  # orbax forgot the steps that the save was to replace
            if self._is_saved_but_for_others(error):
                return
            self._remove_leftovers(looks=5)
            there = ", ".join(map(str, self.numbers()))
            kept = f"steps {there} are kept" if there else "there is no other one"
            raise SaveError(
                f"checkpoint {self._saving} in {self._folder} cannot be saved: {why}; {kept}"
            ) from error

    def _why(self, error: Exception) -> str:
        """With how much room there is, and is wanted, if that is why."""
        why = reason(error)
        if is_local(self._folder) and is_full(error):
            why += f", where {room(self._existing())}"
            why += f" and it takes up to {self._bytes:,} bytes" if self._bytes else ""
        return why

    def _is_saved_but_for_others(self, error: Exception) -> bool:
        """Whether the step is there, and what went wrong was that older ones could not go."""
        step = self._saving
        if jax.process_index() != 0 or step not in self.numbers():
            return False  # process 0 alone removes
        stuck = self.policy.superfluous(self.numbers())
        if not stuck or any(checksums.listed(self._folder / str(step), ITEMS, ("params", "meta"))):
            return False
        self.policy.stuck |= stuck
        caution(
            f"checkpoint {step} is saved, but {', '.join(map(str, sorted(stuck)))} in "
            f"{self._folder}, which it replaces, cannot all be removed: {reason(error)}; the run "
            "goes on, remove them by hand"
        )
        return True

    def _existing(self) -> AnyPath:
        return next(place for place in (self._folder, *self._folder.parents) if place.exists())

    def _remove_leftovers(self, looks: int = 1) -> None:
        """What saves that failed or were killed have left, while nothing is being saved.

        Args:
          looks: how often nothing must be found; threads of a save that has just failed may still
            write there.
        """
        if not is_local(self._folder) or jax.process_index() != 0 or not self._folder.is_dir():
            return
        for _ in range(_REMOVALS):
            left = [*self._folder.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}")]
            looks -= not left
            if not looks:
                break
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)

    def _sum_own(self, item: str) -> None:
        """Called in every process when its files of an item are written."""
        process, folder = jax.process_index(), self._being_saved()
        written = folder / f"{item}{ocp.path.atomicity.TMP_DIR_SUFFIX}"
        written = written if written.exists() else folder / item  # of a bucket
        name = f"ocdbt.process_{process}"
        checksums.write_own(folder, f"{item}.{process}", written / name, f"{item}/{name}")

    def _hear_of_failure(self, error: Exception) -> None:
        self._failure = self._failure or error

    def _write_checksums(self) -> None:
        """Called by orbax on process 0 when all is written, before the folder gets its name."""
        if self._failure is not None:
            raise self._failure
        of = jax.process_count() if self._is_summed else 0
        writers = [f"{item}.{process}" for item in ARRAYS for process in range(of)]
        try:
            checksums.write(self._being_saved(), ITEMS, writers)
        except FileNotFoundError as error:
            raise OSError(errno.EIO, f"not every process has written its part ({error})") from error

    def _being_saved(self) -> AnyPath:
        folder = self._folder / f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}"
        # A bucket's has its name from the start, and a last file completes it.
        return folder if folder.exists() else self._folder / str(self._saving)


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it never asks for a preemption itself.

    It would do so from its thread and for the step that it saves, which the run has passed: JAX
    takes the last step that was asked about for the one that the process is at.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def caution(line: str) -> None:
    """Says something that ends nothing, once for all processes."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)
