"""The state of training, and the one step that changes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moepp_jax import compiler, moe, optim, vocabulary
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax.config import Config, MoEConfig
from moepp_jax.mesh import AXES

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class State:
    """What a checkpoint holds: arrays, or their shapes and shardings in the same places.

    Attributes:
      step: optimizer steps done, which is also the next batch's number.
    """

    step: Any
    params: dict[str, Any]
    opt_state: optax.OptState


def initializer(config: Config) -> Callable[[jax.Array], State]:
    """A function key -> fresh State, to be jitted or only shaped."""
    # Parameters do not depend on the mesh, so the model that declares them runs on one device.
    model = model_lib.build(config)
    optimizer = optim.make_optimizer(config)

    def make(key):
        params = model_lib.init(model, key)
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return make


def abstract_state(config: Config, mesh: Mesh) -> State:
    """Shapes, types and shardings of the state, with nothing allocated."""
    shapes = jax.eval_shape(initializer(config), jax.random.key(config.seed))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        mesh_lib.shardings(shapes, mesh),
    )


def init_state(config: Config, mesh: Mesh) -> State:
    """A fresh state, each part made on the devices that hold it; the same on every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(initializer(config), out_shardings=shardings)(jax.random.key(config.seed))


def state_of(params: dict[str, Any], config: Config, mesh: Mesh) -> State:
    """The state in which training starts from these parameters, which lie on the mesh already."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)).opt_state
    opt_state = jax.jit(optim.make_optimizer(config).init, out_shardings=shardings)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P()))
    return State(step, params, opt_state)


def auxiliary_losses(stats: moe.Statistics, c: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """The balance loss and the z-loss, unweighted, each the mean over the layers.

    Args:
      stats: of every layer, averaged over all tokens: the balance loss multiplies such averages.
    """
    balance = jnp.zeros(())
    if c.balance == "heterogeneous":
        pool = model_lib.pool_of(c)
        balance = moe.heterogeneous_balance(stats.load, stats.prob, pool, c.tau).mean()
    return balance, stats.z.mean()


def loss_function(config: Config, model: model_lib.LanguageModel) -> Callable:
    """loss(params, batch, total) -> (loss, (metrics, load)), for one of the parts of a batch.

    The load is every layer's, (layers, N). To be run in a shard_map over the mesh, on each device's
    part of the parameters and of the sequences; what it returns is of all devices' sequences.
    Cross-entropy is divided by the targets of the whole batch, `total`, and all else by the number
    of parts, so that parts add up to the batch.
    """
    parts = config.train.accumulate

    def loss(params, batch: Batch, total):
        params = model_lib.unite(model, params)
        mask = model_lib.packed_mask(batch["segments"])
        out = model.apply({"params": params}, batch["tokens"], batch["positions"], mask)
        nll = vocabulary.token_losses(params, out.hidden, batch["targets"], config.model.loss_chunk)
        cross_entropy = jax.lax.psum(jnp.sum(nll * batch["loss_mask"]), AXES) / total
        stats = jax.tree.map(lambda a: jax.lax.pmean(a.mean(axis=1), AXES), out.statistics)
        balance, z = (a / parts for a in auxiliary_losses(stats, config.moe))
        load = stats.load / parts
        stats = jax.tree.map(lambda a: a.mean(axis=0), stats)
        summary = moe.summarise(stats, model_lib.pool_of(config.moe))
        metrics = {"loss": cross_entropy, "balance_loss": balance, "z_loss": z}
        metrics |= {name: value / parts for name, value in summary.items()}
        weighted = config.moe.balance_weight * balance + config.moe.z_weight * z
        return cross_entropy + weighted, (metrics, load)

    return loss


def bias_rule(config: Config) -> Callable[[dict[str, Any], jax.Array], dict[str, Any]]:
    """A function (params, load of every layer) -> params, with the routers' biases moved."""
    e = config.moe
    if not e.bias_rate:
        return lambda params, load: params
    pool = model_lib.pool_of(e)
    wanted = moe.bias.wanted_load(pool, e.top_k, e.tau)

    def rule(params, load):
        layers, layer = params["layers"], params["layers"]["moe"]
        moved = moe.bias.moved(layer["router"]["bias"], load, pool, wanted, e.bias_rate)
        router = layer["router"] | {"bias": moved}
        return params | {"layers": layers | {"moe": layer | {"router": router}}}

    return rule


@functools.lru_cache(maxsize=2)
def make_train_step(config: Config, mesh: Mesh) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The jitted step: (state, batch) -> (state, metrics). The state that goes in is donated.

    Whoever asks for the same one soon gets the same one, compiled already.

    The batch's arrays are (batch_size, seq_len): tokens, targets, segments, positions, loss_mask.
    """
    abstract = abstract_state(config, mesh)
    specs = mesh_lib.specs(abstract.params)
    optimizer = optim.make_optimizer(config)
    move_biases = bias_rule(config)
    lr = optim.schedule(config)
    parts = config.train.accumulate
    gradient = jax.grad(loss_function(config, model_lib.build(config, mesh)), has_aux=True)

    def accumulated(params, batch, total):
        def part(carry, batch):
            return jax.tree.map(jnp.add, carry, gradient(params, batch, total)), None

        # Every parts-th sequence, not a run of them: parts do not depend on the mesh.
        split = {k: v.reshape(-1, parts, v.shape[1]).swapaxes(0, 1) for k, v in batch.items()}
        first = jax.eval_shape(gradient, params, {k: v[0] for k, v in split.items()}, total)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        grads = jax.tree.map(_varying, zeros[0], specs)  # as what is added to them
        return jax.lax.scan(part, (grads, zeros[1]), split)[0]

    def on_device(params, batch):
        total = jnp.maximum(jax.lax.psum(jnp.sum(batch["loss_mask"]), AXES), 1.0)
        return (gradient if parts == 1 else accumulated)(params, batch, total)

    on_mesh = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, mesh_lib.BATCH), out_specs=(specs, (P(), P()))
    )

    def step(state: State, batch: Batch):
        grads, (metrics, load) = on_mesh(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = move_biases(optax.apply_updates(state.params, updates), load)
        metrics |= {"grad_norm": optax.global_norm(grads), "lr": lr(state.step)}
        return State(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = NamedSharding(mesh, P())
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, everywhere),
        compiler_options=compiler.options(mesh.devices.flat[0].platform),
    )


def _varying(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.pcast(x, mesh_lib.axes_of(spec), to="varying")
