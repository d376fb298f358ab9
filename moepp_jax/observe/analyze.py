"""A checkpoint and some text to a record of how it was routed: what `main analyze` computes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax import claim
from moepp_jax import mesh as mesh_lib
from moepp_jax.analysis import draw, record
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.harness import suite
from moepp_jax.moe import Rule
from moepp_jax.observe import beside, routed, texts
from moepp_jax.processes import Rows, agree, is_first, on_first, require_alike
from moepp_jax.run import Run, open_run
from moepp_jax.run_data import open_data
from moepp_jax.state import assemble

_UNFINISHED = ".analyze-"  # begins the name of a folder of records that are being written
_TOKENIZER = "put the tokenizer of this model there: tokens are shown as text"


class Text(NamedTuple):
    """What is asked to be looked at; held-out text of all sources if nothing is.

    Attributes:
      files: of text.
      sources: of the run.
      suite: whether the paper's tasks, of which `tasks` are some, from the items in `benchmarks`.
      tokens: of all parts together, about.
      sample: of these, on which kinds of experts are switched off and earlier checkpoints are
        compared; 0 leaves both out.
    """

    files: Sequence[str] = ()
    sources: Sequence[str] = ()
    suite: bool = False
    tasks: Sequence[str] = ()
    benchmarks: str = "data/benchmarks"
    tokens: int = 200_000
    sample: int = 40_000


def analyze(
    config: Config,
    workdir: str | os.PathLike,
    step: int | None,
    text: Text,
    files: Sequence[Path],
    against: Sequence[str] = (),
    progress: Callable[..., Any] = lambda done, total=None: None,
    command: str = "",
) -> None:
    """Writes the record of a run's checkpoint, and of other runs' on the same text.

    The first process writes. Other runs have their own configuration, on the mesh of the first.

    Args:
      step: of the first run; by default the best, or the newest if none was evaluated.
      files: to write, one a run.
      against: work directories of the other runs.
      progress: called with the batches done since the last call, and their total.
      command: that asked for it, for the report.

    Raises:
      ConfigError, CheckpointError: no tokenizer, text or checkpoint, or one that cannot be read;
        another run has another tokenizer.
      DataError: the data is damaged.
    """
    require_alike(f"{workdir} {config.to_json()} {step} {text} {against}")
    if text.tokens < 1:
        raise ConfigError(f"--tokens={text.tokens} must be at least 1")
    runs = [open_run(workdir, step, config), *(_other(name, config) for name in against)]
    parts = agree(lambda: parts_of(config, runs[0], text))
    agree(lambda: _require_same_tokens(runs))
    works = [_Work(run, parts, text) for run in runs]
    progress(0, sum(work.num_batches for work in works))
    with _folder_of(files[0]) as folder:
        for work, file in zip(works, files, strict=True):
            work.write(folder / file.name, command, progress)
        on_first(lambda: _publish(folder, files))


def _other(workdir: str, config: Config) -> Run:
    """A run to compare with, on the mesh of the first one.

    Raises:
      ConfigError: as `open_run`, naming the flag.
    """
    try:
        run = open_run(workdir)
    except ConfigError as error:
        raise ConfigError(f"--against={workdir}: {error}") from error
    return run._replace(config=dataclasses.replace(run.config, mesh=config.mesh))


@contextlib.contextmanager
def _folder_of(file: Path) -> Iterator[Path]:
    """A folder beside the file for what is not finished; the first process makes it, and it goes.

    Raises:
      ConfigError: the folder of the file cannot be written, or another process is at work there.
    """
    with contextlib.ExitStack() as held:

        def make() -> Path:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(claim.claimed(file.parent / ".analyze.lock", leave=False))
                for left in file.parent.glob(f"{_UNFINISHED}*"):  # by one that was killed
                    shutil.rmtree(left, ignore_errors=True)
                return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=file.parent))
            except claim.TakenError as error:
                raise ConfigError(
                    f"{file.parent}: {error.holder}, writes there: wait for it, or give another "
                    "--out"
                ) from error
            except OSError as error:
                raise ConfigError(f"--out={file.parent} cannot be written: {error}") from error

        folder = on_first(make) or file.parent
        if is_first():
            held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _publish(folder: Path, files: Sequence[Path]) -> None:
    """Records of one text together: what was compared with before is of another."""
    for file in (files[0].parent / draw.AGAINST, files[0].parent / draw.PAGE):
        file.unlink(missing_ok=True)
    for file in files:
        (folder / file.name).replace(file)


def _require_same_tokens(runs: Sequence[Run]) -> None:
    first, *others = [run.tokenizer(_TOKENIZER) for run in runs]
    for run, tokenizer in zip(runs[1:], others, strict=True):
        if tokenizer.fingerprint != first.fingerprint:
            raise ConfigError(
                f"--against={run.workdir}: its tokenizer is another than that of "
                f"{runs[0].workdir}: the two would not read the same tokens"
            )


class _Work:
    """One run on the text."""

    def __init__(self, run: Run, parts: Sequence[texts.Part], text: Text):
        config = run.config
        self._run, self._parts, self._each = run, parts, max(1, text.tokens // len(parts))
        self._mesh = mesh_lib.make_mesh(config)
        self._size, self._rule = config.train.batch_size, config.moe.rule
        self._place = Rows(mesh_lib.batch_sharding(self._mesh), self._size)
        sampled = min(text.sample, text.tokens)
        self._sample = beside.sample(parts, sampled, self._size) if sampled else []
        self._steps = steps_of(run) if sampled else []
        self._kinds = beside.kinds_to_mask(self._rule) if sampled else {}

    @property
    def num_batches(self) -> int:
        of_text = routed.count_batches(self._parts, self._each, self._size)
        times = (len(self._kinds) + 1 if self._kinds else 0) + (
            len(self._steps) if len(self._steps) > 1 else 0
        )
        return of_text + times * len(self._sample)

    def write(self, file: Path, command: str, progress: Callable[..., Any]) -> None:
        run, config = self._run, self._run.config
        params = run.params(self._mesh)
        usual = self._observe(self._rule)
        kinds = {part.name: part.kind for part in self._parts}
        name = Path(run.workdir).resolve().name if "://" not in run.workdir else run.workdir
        about = routed.describe(config, name, run.step, run.tokenizer(), kinds)
        rows = routed.observe_parts(
            self._with(usual, params), self._parts, self._each, self._size, progress
        )
        with _writer(file, about) as writer:
            writer.add(command=command)
            for batch in rows:
                writer.write(batch)
            if self._kinds:
                found = beside.switched_off(
                    # Of the rule itself there is a program already.
                    lambda r: self._with(usual if r is self._rule else self._observe(r), params),
                    self._rule,
                    self._kinds,
                    self._sample,
                    progress,
                )
                writer.add(switched_off=found)
            if len(self._steps) > 1:
                chosen = functools.partial(self._chosen, usual, progress)
                writer.add(saturation=beside.saturation(chosen, self._steps, self._rule.pool.size))

    def _observe(self, rule: Rule) -> routed.Observe:
        model = assemble(self._run.config, self._mesh).evaluated
        return routed.make_observe(routed.with_rule(model, rule), self._mesh)

    def _with(self, of: routed.Observe, params: Any) -> routed.Run:
        return routed.running(of, params, self._place)

    def _chosen(self, of: routed.Observe, progress: Callable[..., Any], step: int) -> list[Any]:
        """The experts of the sample's tokens at a checkpoint."""
        run, found = self._with(of, self._run._replace(step=step).params(self._mesh)), []
        for batch in self._sample:
            found.append(run(batch).experts[:, batch["segments"] > 0])
            progress(1)
        return found


def steps_of(run: Run) -> list[int]:
    """The run's checkpoints up to the one that is looked at."""
    with Checkpoints(run.workdir, run.config.train.keep) as checkpoints:
        return [step for step in checkpoints.steps() if step <= run.step]


def parts_of(config: Config, run: Run, text: Text) -> list[texts.Part]:
    """The parts of the text, each under a name of its own.

    Raises:
      ConfigError: a part cannot be read, or two have one name.
    """
    tokenizer, length = run.tokenizer(_TOKENIZER), config.data.seq_len
    parts = [texts.of_file(Path(f), tokenizer, length, text.tokens) for f in text.files]
    if text.sources or not (text.files or text.suite):
        parts += texts.of_sources(open_data(config, run.workdir), text.sources)
    if text.suite and text.benchmarks == suite.HUB:
        raise ConfigError(f"--benchmarks={suite.HUB}: analyze reads items from a folder")
    if text.suite:
        tasks = suite.select(text.tasks, text.benchmarks)
        of_tasks = (Path(text.benchmarks), tokenizer, length, text.tokens // len(tasks))
        parts += texts.of_tasks(tasks, *of_tasks)
    names = [part.name for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two parts of the text are called {twice[0]!r}: leave one out")
    return parts


class _NoWriter:
    """Of the processes that write nothing."""

    def __enter__(self):
        return self

    def write(self, rows: Any) -> None:
        pass

    def add(self, **found: Any) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _writer(file: Path, about: record.Meta) -> Any:
    return record.Writer(file, about) if is_first() else _NoWriter()
