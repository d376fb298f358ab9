"""`moepp_jax`, a model of the lm-evaluation-harness: a run of ours, on all devices of its mesh."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.generation import Generator
from moepp_jax.harness.generation import generate_until, settings_of
from moepp_jax.harness.requests import (
    Pair,
    can_be_scored,
    encode,
    encode_pairs,
    merged,
    row_of,
)
from moepp_jax.harness.scoring import Row, Scorer
from moepp_jax.processes import is_first
from moepp_jax.run import open_run
from moepp_jax.workdir import read_config

logger = logging.getLogger(__name__)

# Rows of full length a device has in a batch unless one says otherwise.
_ROWS = 4

# What an answer gets that cannot be scored, and how many of their items are named.
_IMPOSSIBLE = (-math.inf, False)
_NAMED = 5

# New tokens of a generation whose task names no number, as in the harness's `hf` class.
_MAX_NEW_TOKENS = 256


@dataclasses.dataclass
class Tally:
    """What a task's requests were like.

    Attributes:
      requests: of which `cut` lost their beginning, being longer than what the model sees.
      unscored: of the requests, those whose answer is empty or longer than that.
      tokens: that the model read.
      served: of these, those that each expert served, by layer: (layers, N).
    """

    requests: int = 0
    cut: int = 0
    unscored: int = 0
    tokens: int = 0
    served: np.ndarray | float = 0.0


@register_model("moepp_jax")
class MoEPPJax(LM):
    """A checkpoint of a run, by the harness's conventions for causal models.

    Args:
      workdir: of the run.
      step: which checkpoint; by default the best on held-out text, or the newest.
      config: by default the work directory's; only its mesh may differ.
      batch_size: rows of full length in a batch, or "auto".
      max_length: tokens that the model sees; by default its sequence length in training.
      add_bos_token: begin every text with BOS, as documents begin in training, if they do.
      data, fsdp, expert: sizes of the mesh, where those of the run do not fit the devices.
      count_generated: route generated answers once more to count where their tokens went.
      max_batch_size, device: the harness gives them always; they say nothing here: batches never
        grow, and JAX chooses the devices.

    Attributes:
      tallies: by task, of all requests so far.

    Raises:
      ConfigError, CheckpointError: the work directory cannot be used; the message says why.
    """

    def __init__(
        self,
        workdir: str,
        step: int | None = None,
        config: Config | None = None,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        add_bos_token: bool = True,
        count_generated: bool = False,
        max_batch_size: int | None = None,
        device: str | None = None,
        **mesh: Any,
    ):
        super().__init__()
        if unknown := mesh.keys() - set(mesh_lib.AXES):
            raise ConfigError(f"moepp_jax has no argument {', '.join(sorted(unknown))}")
        run = open_run(workdir, step, (config or read_config(workdir)).replace("mesh", **mesh))
        self._config, self.step = run.config, run.step
        self._tokenizer = run.tokenizer(required_for="benchmarks are texts, and need the tokenizer")
        self._ends, self._bos = run.ends(), add_bos_token
        self.max_length = int(max_length or self._config.data.seq_len)
        self._mesh = mesh_lib.make_mesh(self._config)
        self._params = run.params(self._mesh)
        self._batch_size = _batch_size(batch_size, self._mesh.size)
        self._score = Scorer(
            self._config, self._mesh, self._params, self._batch_size, self.max_length
        )
        self._count_generated = count_generated
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self._workdir = str(workdir)

    @property
    def config(self) -> Config:
        return self._config

    @property
    def max_gen_toks(self) -> int:
        """New tokens by default; at least half of what the model sees is left to the prompt."""
        return min(_MAX_NEW_TOKENS, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.kind}-{self._tokenizer.fingerprint}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps beside its results."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._params))
        return {"workdir": self._workdir, "step": self.step, "model_num_parameters": parameters}

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = encode_pairs(self._tokenizer, [r.args for r in requests], self._bos)
        good = [i for i, pair in enumerate(pairs) if can_be_scored(pair, self.max_length)]
        left = set(range(len(pairs))).difference(good)
        self._leave_out([requests[i] for i in sorted(left)])
        rows = [row_of(pairs[i], self.max_length) for i in good]
        for request, pair in zip(requests, pairs, strict=True):
            self._tally(request, sum(map(len, pair)) > self.max_length + 1)
        answers = [_IMPOSSIBLE] * len(requests)
        found = self._scored([requests[i].task_name for i in good], rows, disable_tqdm)
        for i, answer in zip(good, found, strict=True):
            answers[i] = answer
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        rows, owners = [], []
        texts = encode(self._tokenizer, [r.args[0] for r in requests], self._bos)
        for number, ids in enumerate(texts):
            for window in self._windows(ids):
                rows.append(row_of(window, self.max_length))
                owners.append(number)
        names = [requests[number].task_name for number in owners]
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(
            owners, self._scored(names, rows, disable_tqdm), strict=True
        ):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = encode(self._tokenizer, [r.args[0] for r in requests], self._bos)
        prompts = [prompt or [self._tokenizer.bos_id] for prompt in prompts]
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        texts = [""] * len(requests)
        with self._bar(len(requests), "generating", disable_tqdm) as bar:
            for numbers in groups.values():
                asked = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                settings, stops = settings_of(asked, self._config, self.max_length)
                room = self.max_length - settings.max_new_tokens
                for part in self._parts(numbers, prompts):
                    ids = [prompts[number][-room:] for number in part]
                    for number in part:
                        self._tally(requests[number], len(prompts[number]) > room)
                    new = generate_until(
                        self._generate, self._tokenizer, ids, settings, stops, self._ends
                    )
                    for number, text in zip(part, new, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(part))
        if self._count_generated:
            wholes = zip(prompts, self._tokenizer.encode_batch(texts), strict=True)
            # The answer to the one query is not looked at.
            rows = [Row((p + new)[-self.max_length :], [0], [0]) for p, new in wholes]
            self._scored([r.task_name for r in requests], rows, disable_tqdm)
        return texts

    def _leave_out(self, requests: Sequence[Instance]) -> None:
        """Counts answers that cannot be scored, and names a few."""
        for request in requests:
            self.tallies[request.task_name or ""].unscored += 1
        if requests and is_first():
            named = ", ".join(f"{r.task_name} {r.doc_id}" for r in requests[:_NAMED])
            logger.warning(
                "%d of the answers are empty, or longer than the %d tokens that the model sees: "
                "they count as impossible, and are items %s%s",
                len(requests), self.max_length, named, ", ..." * (len(requests) > _NAMED),
            )  # fmt: skip

    def _tally(self, request: Instance, cut: bool) -> None:
        tally = self.tallies[request.task_name or ""]
        tally.requests += 1
        tally.cut += cut

    def _windows(self, ids: Sequence[int]) -> Iterator[Pair]:
        """Disjoint windows of a text: every token is predicted once, from all that fits before."""
        for window in get_rolling_token_windows(
            list(ids), self._tokenizer.prefix_id, self.max_length, context_len=1
        ):
            yield Pair(*make_disjoint_window(window))

    def _scored(
        self, tasks: Sequence[str | None], rows: Sequence[Row], quiet: bool
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every row's queries together, and whether all are the best tokens."""
        distinct, where = merged(rows)
        with self._bar(len(distinct), "scoring", quiet) as bar:
            scores = self._score(distinct, bar.update)
        answers = []
        for task, row, (number, part) in zip(tasks, rows, where, strict=True):
            score, tally = scores[number], self.tallies[task or ""]
            tally.tokens += len(row.tokens)
            tally.served = tally.served + score.served.astype(np.float64)
            log_prob = score.log_probs[part].sum(dtype=np.float64)
            answers.append((float(log_prob), bool(score.greedy[part].all())))
        return answers

    def _parts(self, numbers: list[int], prompts: list[list[int]]) -> Iterator[list[int]]:
        """Batches of prompts of like length, the longest first."""
        ordered = sorted(numbers, key=lambda number: len(prompts[number]), reverse=True)
        for start in range(0, len(ordered), self._batch_size):
            yield ordered[start : start + self._batch_size]

    @functools.cached_property
    def _generate(self) -> Generator:
        if jax.process_count() > 1:
            raise ConfigError("tasks that generate run in one process: leave them out here")
        model = model_lib.build(self._config, self._mesh, "dropless")
        surplus = self._tokenizer.surplus(self._config.model.vocab_size)
        return Generator(model, self._params, self._mesh, surplus=surplus)

    def _bar(self, total: int, doing: str, quiet: bool) -> tqdm:
        # None: where there is no terminal.
        hidden = True if quiet or not is_first() else None
        return tqdm(total=total, desc=f"moepp_jax: {doing}", disable=hidden)


def _batch_size(asked: int | str | None, devices: int) -> int:
    if asked is None or str(asked).startswith("auto"):
        return _ROWS * devices
    try:
        rows = int(asked)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ConfigError(f"batch_size = {asked!r} must be a number of rows, or auto")
    return rows
