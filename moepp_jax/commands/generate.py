"""generate --workdir=RUN --prompt=TEXT: continues texts.

The text goes to standard output: streamed for one prompt, complete at the end for several. The
speed goes to standard error.
"""

import json
import sys
from pathlib import Path

from absl import flags

from moepp_jax import api, cli, progress, workdir
from moepp_jax.commands import options
from moepp_jax.errors import ConfigError

for _name in ("workdir", "step", "strict", "config", "zero_offset"):
    flags.declare_key_flag(_name)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be given several times")
_PROMPTS_FILE = cli.define_path(
    "prompts_file",
    None,
    "one prompt per line; in *.jsonl, objects with a prompt; - is standard input",
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "text at which generation stops, not part of the output"
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "texts per prompt")
_ALL_DEVICES = flags.DEFINE_bool(
    "all_devices", False, "shard the model over all devices: it need not fit on one"
)
_SETTINGS = {
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "new tokens, at most"),
    "temperature": flags.DEFINE_float("temperature", None, "0 is greedy"),
    "top_k": flags.DEFINE_integer("top_k", None, "0 is off"),
    "top_p": flags.DEFINE_float("top_p", None, "1 is off"),
    "min_p": flags.DEFINE_float("min_p", None, "0 is off"),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "1 is off"),
    "seed": flags.DEFINE_integer("seed", None, "random seed of the sampling"),
}


def run(arguments: list[str]) -> None:
    options.no_more(arguments)
    given = {name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None}
    settings = vars(options.config_of_run().replace("generate", **given).generate)
    prompts = [*_PROMPT.value, *_prompts_of_file()]
    if not prompts:
        raise ConfigError("no --prompt was given: write --prompt='some text'")
    file = workdir.tokenizer_file(options.given_workdir())
    if not file.exists():
        raise ConfigError(f"{file} is missing: put the tokenizer of this model there")
    model = api.load(
        options.given_workdir(),
        options.STEP.value,
        _ALL_DEVICES.value,
        only_generate=True,
        zero_offset=options.ZERO_OFFSET.value,
    )
    _say_what_is_new_to(model, prompts, settings["max_new_tokens"])
    if len(prompts) == _NUM_SAMPLES.value == 1:
        _stream(model, prompts[0], settings)
    else:
        _make_all(model, prompts, settings)
    print(model.speed, file=sys.stderr)


def _say_what_is_new_to(model: api.Model, prompts: list[str], new: int) -> None:
    longest = new + max(map(len, model.tokenizer.encode_batch(prompts)))
    seen = model.config.data.seq_len
    if longest > seen:
        print(
            f"note: up to {longest:,} tokens with the prompt, where the model was trained on texts "
            f"of {seen:,}: what it writes past those may be worth little",
            file=sys.stderr,
        )


def _stream(model: api.Model, prompt: str, settings: dict) -> None:
    pieces = model.stream(prompt, stop=_STOP.value, **settings)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print("\n")


def _make_all(model: api.Model, prompts: list[str], settings: dict) -> None:
    samples = _NUM_SAMPLES.value
    most = len(prompts) * samples * settings["max_new_tokens"]
    with progress.passing_bar("tokens", most) as moved:
        texts = model.generate(
            prompts, stop=_STOP.value, num_samples=samples, progress=moved, **settings
        )
    for prompt, of_prompt in zip(prompts, texts, strict=True):
        for text in of_prompt:
            print(f"{prompt}{text}\n")


def _prompts_of_file() -> list[str]:
    """
    Raises:
      ConfigError: the file cannot be read, or a line holds no prompt.
    """
    name = _PROMPTS_FILE.value
    if not name:
        return []
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts_file={name} cannot be read: {error}") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts_file={name} holds no prompt")
    if not name.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_prompt_of(line, f"--prompts_file={name}, line {n}") for n, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from None
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise ConfigError(f'{where} = {line!r} must be {{"prompt": "some text"}}')
    return prompt
