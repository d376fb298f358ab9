"""The commands that are watched, and what they work on: tiny models, which do much in little time.

What a command keeps of a step, a text or a question is what it would keep of a large model's.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

MOEPP = (sys.executable, "-m", "moepp_jax.main")

# Evaluations, saves and local copies come as often as in runs of days; all of them leave memory.
SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.vocab_size": 384,
    "model.dense_ffn_size": 64,
    "moe.ffn_size": 48,
    "moe.group_size": 64,
    "data.seq_len": 64,
    "data.eval_fraction": 0.1,
    "optim.warmup_steps": 10,
    "train.batch_size": 4,
    "train.log_every": 10,
    "train.eval_every": 200,
    "train.eval_batches": 2,
    "train.save_every": 500,
    "train.local_every": 100,
}
_WORDS = (
    "the of and to in a that is was he for it with as his on be at by had not are but they which"
)
_NEW = 16  # tokens of a text that is generated


class Room(NamedTuple):
    """What all jobs work on.

    Attributes:
      folder: of everything that they write.
      run: a short run, whose model generates and is evaluated.
      steps: of the training that is watched.
      items: texts that are continued, and questions that are answered.
    """

    folder: Path
    run: Path
    steps: int
    items: int


class Job(NamedTuple):
    """A command with a progress bar.

    Attributes:
      command: its arguments.
      count: steps or items of the whole job.
      unit: what these are.
    """

    command: tuple[str, ...]
    count: int
    unit: str


def room(folder: Path, steps: int, items: int) -> Room:
    """Makes text, data and the short run.

    Raises:
      subprocess.CalledProcessError: the short run ends with an error; it has said which.
    """
    dice = random.Random(0)
    texts = "\n\n".join(_sentence(dice, dice.randint(5, 200)) for _ in range(2000))
    _text(folder).write_text(texts)
    made = Room(folder, folder / "run", steps, items)
    command = _training(made, made.run, {"train.steps": 20})
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def _text(folder: Path) -> Path:
    return folder / "text.txt"


def _training(room: Room, workdir: Path, changes: Mapping[str, object]) -> tuple[str, ...]:
    own = {"data.dir": room.folder / "data", "data.sources.text.path": _text(room.folder)}
    fields = {**SMALL, **own, **changes}
    flags = (f"--config.{name}={value}" for name, value in fields.items())
    return (*MOEPP, "train", "--config=tiny", f"--workdir={workdir}", *flags)


def _train(room: Room) -> Job:
    own = {"train.steps": room.steps, "train.local_dir": room.folder / "local"}
    return Job(_training(room, room.folder / "long", own), room.steps, "step")


def _generate(room: Room) -> Job:
    """Prompts of one word to more than the model was trained on, each with a sampled text."""
    dice, file = random.Random(1), room.folder / "prompts.txt"
    file.write_text("".join(_sentence(dice, dice.randint(1, 60)) + "\n" for _ in range(room.items)))
    options = (f"--prompts_file={file}", f"--max_new_tokens={_NEW}", "--temperature=1")
    command = (*MOEPP, "generate", f"--workdir={room.run}", *options)
    return Job(command, room.items, "text")


def _lm_eval(room: Room) -> Job:
    """PIQA's questions: two answers each, of which the likelier one is chosen."""
    dice, file = random.Random(2), room.folder / "benchmarks" / "piqa" / "validation.jsonl"
    file.parent.mkdir(parents=True)
    questions = (
        {
            "goal": _sentence(dice, dice.randint(1, 20)),
            "sol1": _sentence(dice, dice.randint(1, 20)),
            "sol2": _sentence(dice, dice.randint(1, 20)),
            "label": dice.randrange(2),
        }
        for _ in range(room.items)
    )
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = (f"--benchmarks={file.parents[1]}", "--tasks=piqa")
    command = (*MOEPP, "lm_eval", f"--workdir={room.run}", *options)
    return Job(command, room.items, "question")


JOBS: Mapping[str, Callable[[Room], Job]] = {
    "train": _train,
    "generate": _generate,
    "lm_eval": _lm_eval,
}


def _sentence(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(_WORDS.split(), k=words)).capitalize() + "."
