"""What a routing rule is: one object that says how tokens choose experts, and what follows from it.

A rule is a frozen dataclass. Its fields are the options of a recipe, declared by `option`; `rules`
holds one rule a file, and makes them by name.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moepp_jax.moe.experts import Pool
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param

Params = Mapping[str, Float[Array, "..."]]


class RuleError(ValueError):
    """A rule that cannot be; the message names the option, its value and what would be right."""


class Routing(NamedTuple):
    """What a rule decided for every token.

    Attributes:
      experts: the chosen experts; those of one token are distinct. N is an unused choice.
      gates: their weights in the layer's output, 0 for an unused choice.
      scores: of all experts, which losses and statistics average.
      logits: raw, with the gating residual in them; the next layer's rule reads these.
    """

    experts: Int[Array, "G S K"]
    gates: Float[Array, "G S K"]
    scores: Float[Array, "G S N"]
    logits: Float[Array, "G S N"]


class Loss(NamedTuple):
    """A term of the training loss: weight times value, averaged over the layers."""

    value: Float[Array, "*L"]
    weight: Any


def option(
    default: Any,
    choices: tuple = (),
    at_least: float | int | None = None,
    above: float | int | None = None,
    at_most: float | int = math.inf,
) -> Any:
    """A field of a rule that a recipe may set, with the values that it may have."""
    bounds = {"choices": choices, "at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(default=default, metadata=bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How tokens choose experts. What a rule does not say is as here.

    `params` and `state` say what a rule owns in every layer; both are in the dictionary that
    `route` is given. Params are trained. State is moved by `update` alone: no gradient, decay or
    optimizer touches it; it is replicated and saved with the parameters. Arrays of `losses` and
    `update` may have leading axes *L, the layers.

    Attributes:
      pool: the experts that there are.
    """

    pool: Pool

    def __init_subclass__(cls):
        # An option of such a name would silently take the place of what the name means.
        for name in {*inspect.get_annotations(cls)} & {*vars(Rule)}:
            raise TypeError(f"{cls.__name__}: an option cannot be called {name}")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.metadata:
                _require_within(field.name, getattr(self, field.name), **field.metadata)
        self.check()

    @classmethod
    def typed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options as they come from a recipe, whose whole numbers may stand for fractions.

        Raises:
          RuleError: one is of another type.
        """
        kinds = get_type_hints(cls)
        return {name: _typed(name, value, kinds[name]) for name, value in options.items()}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Every option with its default."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name != "pool"}

    def check(self) -> None:
        """
        Raises:
          RuleError: options contradict each other or the pool.
        """

    def require(self, holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise RuleError(f"{name} = {getattr(self, name)!r} {remedy}")

    @property
    def most(self) -> int:
        """K: the most experts that a token can have."""
        raise NotImplementedError

    @property
    def load(self) -> tuple[float, ...]:
        """(N,): the share of the tokens that each expert has at balance, before drops.

        Capacity, FLOPs, traffic and the targets of biases derive from it.
        """
        raise NotImplementedError

    @property
    def ffn_load(self) -> float:
        """FFN experts that a token has at balance."""
        return sum(self.load[: self.pool.n_ffn])

    def params(self, width: int, std: float) -> dict[str, Param]:
        """What is trained, for tokens of D = width, matrices being N(0, std)."""
        raise NotImplementedError

    def state(self) -> dict[str, Param]:
        """What `update` moves."""
        return {}

    def route(
        self, x_GSD: Float[Array, "G S D"], previous_GSN: Float[Array, "G S N"], params: Params
    ) -> Routing:
        """Routes every token, in float32.

        Args:
          x_GSD: the layer's input, of any float type.
          previous_GSN: the logits of the MoE layer before, zeros for the first.
          params: arrays of `params` and of `state`; the latter carry no gradient.
        """
        raise NotImplementedError

    def measure(self, routing: Routing) -> dict[str, Float[Array, "G ..."]]:
        """What `losses` and `update` want to know beside `Statistics`, averaged over each group."""
        return {}

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        """
        Args:
          stats: averaged over all tokens, as the losses multiply such averages.
        """
        return {}

    def update(self, state: Params, stats: Statistics) -> Params:
        """The state after a step; stats are averaged over all tokens of the batch."""
        return state


def state_param(*shape: int, mean: float = 0.0) -> Param:
    """A parameter that a rule moves, and nothing else."""
    return Param(shape, mean=mean, decay=False, float32=True)


def require_sound(rule: Rule, width: int = 8) -> None:
    """Routes a few tokens, and holds what comes to what every layer relies on.

    Raises:
      RuleError: shapes or types are others than `Routing` says, an expert is out of range or chosen
        twice by a token, or an unused choice has a gate.
    """
    N = rule.pool.size
    described = rule.params(width, 0.5) | rule.state()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), described)
    x = jax.ShapeDtypeStruct((2, 8, width), jnp.float32)
    previous = jax.ShapeDtypeStruct((2, 8, N), jnp.float32)
    name = type(rule).__name__
    routing = jax.eval_shape(rule.route, x, previous, shapes)
    wanted = {"experts": rule.most, "gates": rule.most, "scores": N, "logits": N}
    for field, last in wanted.items():
        got = getattr(routing, field).shape
        if got != (2, 8, last):
            raise RuleError(f"{name}.route gives {field} of shape {got}, not {(2, 8, last)}")
    if len(rule.load) != N:
        raise RuleError(f"{name}.load has {len(rule.load)} entries for {N} experts")
    experts, gates = _routed(rule, width, N)
    if experts.min() < 0 or experts.max() > N:
        raise RuleError(f"{name}.route chooses expert {experts.max()} of {N}")
    for expert in range(N):
        if ((experts == expert).sum(axis=-1) > 1).any():
            raise RuleError(f"{name}.route chooses expert {expert} twice for a token")
    if gates[experts == N].any():
        raise RuleError(f"{name}.route gives unused choices (expert {N}) gates: they must be 0")


def _routed(rule: Rule, width: int, N: int):
    """Experts and gates of a few random tokens, computed at once, whatever is being traced."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        return rng.normal(mean, std, shape).astype(np.float32)

    described = rule.params(width, 0.5) | rule.state()
    params = {name: normal(*p.shape, mean=p.mean, std=p.std) for name, p in described.items()}
    with jax.ensure_compile_time_eval():
        routing = jax.jit(rule.route)(normal(2, 8, width), normal(2, 8, N), params)
        return jax.device_get((routing.experts, routing.gates))


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise RuleError(f"{name} = {value!r} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise RuleError(f"{name} = {value!r} must be finite")
    return value


def _require_within(name, value, choices, at_least, above, at_most) -> None:
    if choices and value not in choices:
        known = ", ".join(map(repr, choices))
        raise RuleError(f"{name} = {value!r} must be one of {known}")
    if at_least is not None and not at_least <= value <= at_most:
        upper = f" and at most {at_most}" if at_most < math.inf else ""
        raise RuleError(f"{name} = {value!r} must be at least {at_least}{upper}")
    if above is not None and not above < value <= at_most:
        upper = f" and at most {at_most}" if at_most < math.inf else ""
        raise RuleError(f"{name} = {value!r} must be greater than {above}{upper}")
