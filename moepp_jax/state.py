"""What a run is put together from, the state of training, and the one step that changes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moepp_jax import attend, compiler, guard, model, moe, optim
from moepp_jax import mesh as mesh_lib
from moepp_jax.config import Config
from moepp_jax.mesh import AXES
from moepp_jax.moe import kernels, param

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# Parts of the state that earlier versions did not save: see `completed`.
LATER = ("guard",)


@flax.struct.dataclass
class State:
    """What a checkpoint holds: arrays, or their shapes and shardings in the same places.

    Attributes:
      step: optimizer steps done, which is also the next batch's number.
      guard: what is remembered of its gradients.
    """

    step: Any
    params: dict[str, Any]
    opt_state: optax.OptState
    guard: guard.Guard


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """What a configuration is on a mesh, built once; `assemble` makes it.

    Attributes:
      model: of training.
      evaluated: the same with the dispatch of evaluation.
      abstract: shapes, types and shardings of the state.
    """

    config: Config
    mesh: Mesh
    model: model.LanguageModel
    evaluated: model.LanguageModel
    optimizer: optax.GradientTransformation
    abstract: State

    @property
    def specs(self) -> Any:
        """How the parameters lie on the mesh."""
        return mesh_lib.specs(self.model.described)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform


@functools.lru_cache(maxsize=4)
def assemble(config: Config, mesh: Mesh) -> Assembly:
    """Model, rule, optimizer and abstract state. Who asks for the same again gets the same one."""
    trained = model.build(config, mesh)
    optimizer = optim.make_optimizer(config, trained.described)
    lies = mesh_lib.shardings(trained.described, mesh)
    everywhere = NamedSharding(mesh, P())
    shapes = param.shapes(trained.described)
    params = jax.tree.map(_placed, shapes, lies)
    opt_state = optax.tree_map_params(
        optimizer,
        _placed,
        jax.eval_shape(optimizer.init, shapes),
        lies,
        transform_non_params=lambda leaf: _placed(leaf, everywhere),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    watched = jax.tree.map(
        lambda leaf: _placed(leaf, everywhere), jax.eval_shape(guard.Guard.fresh)
    )
    abstract = State(step, params, opt_state, watched)
    evaluated = model.build(config, mesh, config.moe.eval_dispatch)
    return Assembly(config, mesh, trained, evaluated, optimizer, abstract)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def init_state(parts: Assembly) -> State:
    """A fresh state, each part made on the devices that hold it; the same on every mesh."""

    def make(key):
        params = parts.model.init(key)
        opt_state = parts.optimizer.init(params)
        return State(jnp.zeros((), jnp.int32), params, opt_state, guard.Guard.fresh())

    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(parts.config.seed))


def state_of(params: dict[str, Any], parts: Assembly) -> State:
    """The state in which training starts from these parameters, which lie on the mesh already."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)
    opt_state = jax.jit(parts.optimizer.init, out_shardings=shardings.opt_state)(params)
    return _beginning(params, opt_state, parts)


def restarted(state: State, parts: Assembly) -> State:
    """The state at step 0 again: parameters and moments stay, the learning rate is at its start."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)
    begin = jax.jit(optim.at_its_start, out_shardings=shardings.opt_state, donate_argnums=0)
    return _beginning(state.params, begin(state.opt_state), parts)


def _beginning(params: dict[str, Any], opt_state: optax.OptState, parts: Assembly) -> State:
    step = jax.device_put(jnp.zeros((), jnp.int32), parts.abstract.step.sharding)
    return State(step, params, opt_state, _fresh_guard(parts))


def _fresh_guard(parts: Assembly) -> guard.Guard:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract.guard)
    return jax.jit(guard.Guard.fresh, out_shardings=shardings)()


def completed(state: State, parts: Assembly) -> State:
    """A state that was saved by an earlier version, which remembered nothing of gradients."""
    lacks = isinstance(state.guard.norm, jax.ShapeDtypeStruct)
    return state.replace(guard=_fresh_guard(parts)) if lacks else state


def loss_function(parts: Assembly) -> Callable:
    """loss(params, batch, total) -> (loss, (metrics, statistics)), for a part of a batch.

    The statistics are every layer's, leading axis the layers. To be run in a shard_map over the
    mesh, on each device's part of the parameters and of the sequences; what it returns is of all
    devices' sequences. Cross-entropy is divided by the targets of the whole batch, `total`, and all
    else by the number of parts, so that parts add up to the batch.
    """
    rule, num_parts = parts.model.rule, parts.config.train.accumulate

    def loss(params, batch: Batch, total):
        out, summed = parts.model.loss_of_batch(params, batch, batch["loss_mask"] / total)
        cross_entropy = jax.lax.psum(summed, AXES)
        stats = jax.tree.map(lambda a: jax.lax.pmean(a.mean(axis=1), AXES), out.statistics)
        state = jax.lax.stop_gradient(parts.model.rule_state(params))
        auxiliary = rule.losses(stats, state)
        metrics = {name: term.value.mean() / num_parts for name, term in auxiliary.items()}
        metrics["loss"] = cross_entropy
        weighted = sum(jnp.mean(term.weight * term.value) for term in auxiliary.values())
        stats = jax.tree.map(lambda a: jax.lax.stop_gradient(a) / num_parts, stats)
        return cross_entropy + weighted / num_parts, (metrics, stats)

    return loss


@functools.lru_cache(maxsize=2)
def make_train_step(
    parts: Assembly, donated: bool = True
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The jitted step: (state, batch) -> (state, metrics). The state that goes in is donated.

    Whoever asks for the same one soon gets the same one, compiled already.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)
    options = compiler.options(
        parts.platform,
        kernels.limited_routing(parts.mesh),
        attend.chosen(parts.config.model, parts.platform) == "xla",
    )
    return jax.jit(
        step_function(parts),
        donate_argnums=0 if donated else (),
        out_shardings=(shardings, NamedSharding(parts.mesh, P())),
        compiler_options=options,
    )


def step_function(parts: Assembly) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """What a step computes: (state, batch) -> (state, metrics).

    The batch's arrays are (batch_size, seq_len): tokens, targets, segments, positions, loss_mask.
    """
    specs, optimizer, rule = parts.specs, parts.optimizer, parts.model.rule
    lr = optim.schedule(parts.config)
    num_parts = parts.config.train.accumulate
    is_sound, chosen = guard.soundness(parts.config.train), guard.choice(parts.config.train)
    gradient = jax.grad(loss_function(parts), has_aux=True)

    def accumulated(params, batch, total):
        def part(carry, batch):
            return jax.tree.map(jnp.add, carry, gradient(params, batch, total)), None

        split = in_parts(batch, num_parts)
        first = jax.eval_shape(gradient, params, {k: v[0] for k, v in split.items()}, total)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        grads = jax.tree.map(_varying, zeros[0], specs)  # as what is added to them
        return jax.lax.scan(part, (grads, zeros[1]), split)[0]

    def on_device(params, batch):
        total = jnp.maximum(jax.lax.psum(jnp.sum(batch["loss_mask"]), AXES), 1.0)
        return (gradient if num_parts == 1 else accumulated)(params, batch, total)

    on_mesh = jax.shard_map(
        on_device,
        mesh=parts.mesh,
        in_specs=(specs, mesh_lib.BATCH),
        out_specs=(specs, (P(), P())),
    )

    def step(state: State, batch: Batch):
        grads, (metrics, stats) = on_mesh(state.params, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        # Of the parameters before the step: what the optimizer made of the rule's state is nothing.
        moved = rule.update(parts.model.rule_state(state.params), stats)
        params = parts.model.with_rule_state(params, moved)
        norm, by_block = optax.global_norm(grads), guard.norm_by_block(grads)
        sound = is_sound(state.guard, metrics["loss"], norm)
        lost = guard.first_lost(stats.entropy), guard.last_lost(by_block)
        watched = state.guard.after(state.step + 1, sound, norm, *lost)
        params, opt_state = chosen(sound, (params, opt_state), (state.params, state.opt_state))
        # Rates are of the whole batch: parts have other shares of the choices.
        metrics |= moe.summarise(jax.tree.map(lambda a: a.mean(axis=0), stats), rule.pool)
        # The log makes a few numbers of a layer's loads, and words of the guard.
        metrics |= {"load": stats.load, "router_entropy_by_layer": stats.entropy}
        metrics |= {"grad_norm": norm, "grad_norm_by_block": by_block, "lr": lr(state.step)}
        return State(state.step + 1, params, opt_state, watched), metrics | {"guard": watched}

    return step


def in_parts(batch: Batch, num_parts: int) -> Batch:
    """A batch, or a device's part of it, as parts that are worked through one by one.

    Every num_parts-th sequence, not a run of them: parts do not depend on the mesh.
    """
    return {k: v.reshape(-1, num_parts, v.shape[1]).swapaxes(0, 1) for k, v in batch.items()}


def _varying(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.pcast(x, mesh_lib.axes_of(spec), to="varying")
