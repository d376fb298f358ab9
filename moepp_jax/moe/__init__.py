"""The MoE++ layer as pure functions of arrays (arXiv 2410.07348): jax and jaxtyping, nothing else.

The letters of the shapes, here and wherever a name ends in them (`x_GSD`):

  G  groups: runs of S consecutive tokens of one sequence, which share a capacity
  S  tokens of a group
  T  tokens of a device, G S
  D  width of the model
  N  experts of all kinds, in this order: E FFN, J constant, copy, zero
  E  FFN experts
  J  constant experts
  K  experts that a token can choose; expert N is an unused choice
  C  slots that one FFN expert has for one group
  F  width of an FFN expert
  R  rows of a buffer of tokens on their way to the FFN experts

Data flows one way: rule.route -> dispatch -> rows.gather -> experts -> rows.combine, and on an
expert axis the experts are reached by `exchange` (fixed slots) or `transfer` (as many rows as there
are). `layer.local` composes them for the tokens of one device, `layer.routed` tells each token's
way too, and `layer.sharded` runs them under shard_map on a mesh. What varies between models is the
`Rule` and a function for each other choice, given when the `layer.MoE` is built, never a flag
tested in traced code. `rules` holds one rule a file.
"""

from moepp_jax.moe import rules
from moepp_jax.moe.dispatch import capacity
from moepp_jax.moe.experts import KEEPING_SWIGLU, Keeping, Pool, swiglu
from moepp_jax.moe.grouped import Blocked
from moepp_jax.moe.layer import MoE, Routed, describe, local, routed, sharded
from moepp_jax.moe.losses import Statistics, heterogeneous_balance, summarise
from moepp_jax.moe.param import Param, init
from moepp_jax.moe.paths import dropless, with_capacity
from moepp_jax.moe.ragged import Ragged
from moepp_jax.moe.rule import Loss, Routing, Rule, RuleError

__all__ = [
    "KEEPING_SWIGLU",
    "Blocked",
    "Keeping",
    "Loss",
    "MoE",
    "Param",
    "Pool",
    "Ragged",
    "Routed",
    "Routing",
    "Rule",
    "RuleError",
    "Statistics",
    "capacity",
    "describe",
    "dropless",
    "heterogeneous_balance",
    "init",
    "local",
    "routed",
    "rules",
    "sharded",
    "summarise",
    "swiglu",
    "with_capacity",
]
