"""convert: checkpoints in the layouts of others, to work directories and back.

convert from-hf PATH WORKDIR   # a released MoE++ or a ZEDA checkpoint
convert to-hf WORKDIR PATH     # back; with --layout a vanilla MoE for transformers
convert upcycle PATH WORKDIR   # LLaMA, Mistral, Mixtral, OLMoE, Qwen3, Qwen3-MoE into MoE++
"""

from absl import flags

from moepp_jax import cli, interop
from moepp_jax.commands import options
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError, did_you_mean

for _name in ("config", "step", "strict"):
    flags.declare_key_flag(_name)
_DTYPE = flags.DEFINE_string(
    "dtype",
    None,
    "from-hf, upcycle: type of the arithmetic; to-hf: type of the tensors; default: the source's",
)
_LAYOUT = flags.DEFINE_string(
    "layout", "moepp", f"to-hf: layout of names and fields: {', '.join(interop.LAYOUTS)}"
)
_TOKENIZER = cli.define_path(
    "tokenizer", None, "upcycle: a SentencePiece model or tokenizer.json, if PATH has none"
)
_SETTINGS = {
    "n_ffn": flags.DEFINE_integer("n_ffn", None, "upcycle: number of copies of a dense FFN"),
    "n_const": flags.DEFINE_integer("n_const", None, "upcycle: number of constant experts"),
    "n_copy": flags.DEFINE_integer("n_copy", None, "upcycle: number of copy experts"),
    "n_zero": flags.DEFINE_integer("n_zero", None, "upcycle: number of zero experts"),
    "tau": flags.DEFINE_float("tau", None, "upcycle: config.moe.rule.tau"),
    "bias_rate": flags.DEFINE_float("bias_rate", None, "upcycle: config.moe.rule.bias_rate"),
}


def run(arguments: list[str]) -> None:
    if len(arguments) != 3 or arguments[0] not in _WAYS:
        said = f", not convert {' '.join(arguments)}" if arguments else ""
        way = "".join(arguments[:1])
        hint = "" if way in _WAYS else did_you_mean(way, _WAYS)
        raise ConfigError(
            "write convert from-hf PATH WORKDIR, convert to-hf WORKDIR PATH, or convert upcycle "
            f"PATH WORKDIR{said}{hint}"
        )
    way, source, target = arguments
    _WAYS[way](source, target)


def _from_hf(source: str, target: str) -> None:
    interop.from_hf(source, target, _recipe(), _DTYPE.value)


def _to_hf(source: str, target: str) -> None:
    interop.to_hf(source, target, options.STEP.value, _DTYPE.value, layout=_LAYOUT.value)


def _upcycle(source: str, target: str) -> None:
    settings = {name: flag.value for name, flag in _SETTINGS.items()}
    interop.upcycle(source, target, _recipe(), _DTYPE.value, _TOKENIZER.value, **settings)


_WAYS = {"from-hf": _from_hf, "to-hf": _to_hf, "upcycle": _upcycle}


def _recipe() -> Config | None:
    return None if options.CONFIG.value is None else options.given_config()
