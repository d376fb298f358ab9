"""From a configuration to its `Dataset`, and what to say of one."""

from __future__ import annotations

from moepp_jax.config import Config
from moepp_jax.data.dataset import Dataset, Origin
from moepp_jax.data.prepare import prepare_sources, prepared_sources
from moepp_jax.data.sources import Report


def prepare(config: Config, report: Report = print) -> Dataset:
    """The batches of this configuration; makes first what is missing of the prepared data.

    Raises:
      ConfigError: the text or the tokenizer cannot be used; the message says why.
      DataError: what was prepared is damaged.
    """
    return Dataset(config, prepare_sources(config, report))


def open_dataset(config: Config) -> Dataset:
    """What `prepare` has made; makes nothing.

    Raises:
      ConfigError: something is missing; the message names it and says how to make it.
      DataError: what was prepared is damaged.
    """
    return Dataset(config, prepared_sources(config))


def describe(dataset: Dataset, steps: int) -> str:
    """A table of the sources: what they hold, and what a training run of so many steps makes of it.

    A run that takes a source more than about four times learns it by heart (epochs).
    """
    taken = dataset.taken(steps)
    lines = [("source", "share", "documents", "tokens", "filled", "held out", "trained", "epochs")]
    for name, source in dataset.sources.items():
        lines.append(
            (
                name,
                f"{dataset.shares[name]:.2%}",
                f"{len(source.train_documents):,}",
                f"{source.train.num_tokens:,}",
                f"{source.train.efficiency:.2%}",
                f"{source.eval.num_tokens:,}",
                f"{taken[name].tokens:,}",
                f"{taken[name].epochs:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def describe_batch(dataset: Dataset, step: int) -> str:
    """A table of the rows of the batch that a step trains on: their documents, how they begin.

    Args:
      step: as the metrics count it, from 1 on.
    """
    batch = dataset.train_batch(step - 1)
    lines = [f"{'row':>5}  {'source':12}  {'its row':>9}  {'documents':>15}  begins with"]
    for i, origin in enumerate(dataset.of_batch(step - 1)):
        text = dataset.tokenizer.decode(batch["tokens"][i, :40])
        documents = f"{origin.first:,} to {origin.last:,}"
        begins = repr(text[:60])
        lines.append(f"{i:5}  {origin.source:12}  {origin.row:9,}  {documents:>15}  {begins}")
    return "\n".join(lines)


# Rows of a source that a line has room for.
_FEW = 8


def summarise_batch(dataset: Dataset, step: int) -> str:
    """In words, how many rows of that batch each source has, and of which documents they are.

    Args:
      step: as the metrics count it, from 1 on.
    """
    by_source: dict[str, list[Origin]] = {}
    for origin in dataset.of_batch(step - 1):
        by_source.setdefault(origin.source, []).append(origin)
    each = "; ".join(_of_source(name, origins) for name, origins in sorted(by_source.items()))
    return (
        f"the batch of step {step} has {each}; `moepp data batch {step}` with this run's --workdir "
        "shows how they begin"
    )


def _of_source(name: str, origins: list[Origin]) -> str:
    spans = sorted({(origin.first, origin.last) for origin in origins})
    said = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in spans[:_FEW]]
    more = f" and {len(spans) - _FEW:,} more" if len(spans) > _FEW else ""
    rows = "1 row" if len(origins) == 1 else f"{len(origins):,} rows"
    return f"{rows} of {name}, documents {', '.join(said)}{more}"
