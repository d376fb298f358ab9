"""completion bash|zsh: prints a script that completes commands, flags, fields and recipes.

eval "$(moepp completion bash)"               # in this shell
moepp completion bash >> ~/.bash_completion   # in every one
"""

from __future__ import annotations

from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict

from moepp_jax import main, recipes
from moepp_jax.configs import base
from moepp_jax.errors import ConfigError

# Words are broken at "=": --config=tiny are three.
_SCRIPT = """\
_moepp() {
  local cur=${COMP_WORDS[COMP_CWORD]} flag="" word command="" words
  if [[ $cur == "=" ]]; then
    flag=${COMP_WORDS[COMP_CWORD-1]} cur=""
  elif (( COMP_CWORD > 1 )) && [[ ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then
    flag=${COMP_WORDS[COMP_CWORD-2]}
  fi
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case $word in %(either)s) command=$word; break ;; esac
  done
  case $flag in
    "") ;;
    --config) COMPREPLY=($(compgen -W "%(recipes)s" -- "$cur") $(compgen -f -- "$cur")); return ;;
    *) COMPREPLY=($(compgen -f -- "$cur")); return ;;
  esac
  case $command in
    "") words="%(commands)s --help --version" ;;
%(cases)s
  esac
  if [[ $cur == --config.* ]]; then words="%(fields)s"; fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  if [[ $cur != -* && -n $command ]]; then COMPREPLY+=($(compgen -f -- "$cur")); fi
  if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o filenames -F _moepp moepp
"""
_BEFORE = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}
# What stands after a command, besides flags.
_WORDS = {
    "data": "prepare verify benchmarks",
    "convert": "from-hf to-hf upcycle",
    "completion": " ".join(_BEFORE),
}


def run(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in _BEFORE:
        raise ConfigError(f"write completion {' or completion '.join(_BEFORE)}")
    print(_BEFORE[arguments[0]] + script(), end="")


def script() -> str:
    """That of bash, which zsh understands too."""
    cases = "\n".join(f'    {name}) words="{_after(name)}" ;;' for name in main.COMMANDS)
    return _SCRIPT % {
        "cases": cases,
        "commands": " ".join(main.COMMANDS),
        "either": "|".join(main.COMMANDS),
        "fields": " ".join(f"--config.{name}=" for name in _fields(base.get_config())),
        "recipes": " ".join(recipes.names()),
    }


def _after(command: str) -> str:
    module = main.load(command)
    known = flags.FLAGS.get_key_flags_for_module(module.__name__)
    given = sorted(f"--{flag.name}{'' if flag.boolean else '='}" for flag in known)
    return " ".join([*_WORDS.get(command, "").split(), *given, "--help"])


def _fields(config: ConfigDict, before: str = "") -> Iterator[str]:
    for name, value in sorted(config.items()):
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{before}{name}.")
        else:
            yield before + name
