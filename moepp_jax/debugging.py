"""`train --debug`: which operation of a step made its first NaN, and on which line it was written.

Steps run as ever, but keep the state that they start from. Where one ends with numbers that are not
finite, it is computed once more by a program that looks at the result of every operation. That is
made of the step's own jaxpr, operation by operation: JAX's `checkify` cannot carry its errors
through a scan in a shard_map, and `jax_debug_nans` computes again from buffers that were donated.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from moepp_jax import state as state_lib
from moepp_jax.metrics import DivergedError

# Operations that are others' jaxprs, and where these are in their parameters.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}

# Operations whose results are numbers that were there before.
_MOVING = {
    "all_gather",
    "all_to_all",
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
    "expand_dims",
    "gather",
    "iota",
    "name",
    "neg",
    "optimization_barrier",
    "pad",
    "ppermute",
    "pvary",
    "reduce_max",
    "reshape",
    "rev",
    "select_n",
    "slice",
    "sort",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}

# Where no line is anybody's who uses them.
_LIBRARIES = [str(Path(module.__file__).parent) for module in (jax, flax, optax)]
_LIBRARIES.append(str(Path(jax.__file__).parents[1] / "jaxlib"))
_LIBRARIES += [sysconfig.get_path("stdlib") + os.sep, __file__]


class _Operation(NamedTuple):
    """An operation that is looked at: of a loop, those of its body; of all else, none."""

    eqn: Any
    body: list[_Operation]


def explained(parts: state_lib.Assembly) -> Callable:
    """The step of `state.make_train_step`, which donates nothing.

    It raises:
      DivergedError: loss, gradient or new state are not finite; names the operation.
    """
    run = state_lib.make_train_step(parts, donated=False)
    is_finite = jax.jit(_all_finite, out_shardings=NamedSharding(parts.mesh, P()))

    def step(state, batch):
        after, metrics = run(state, batch)
        watched = metrics["loss"], metrics["grad_norm"], after.params, after.opt_state
        if not jax.device_get(is_finite(watched)):
            with jax.transfer_guard("allow"):
                number = int(jax.device_get(state.step)) + 1
                said = first(state_lib.step_function(parts), parts.mesh, state, batch)
            raise DivergedError(f"step {number}: {said}", number)
        return after, metrics

    return step


def _all_finite(tree: Any) -> Bool[Array, ""]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def first(function: Callable, mesh: jax.sharding.Mesh, *arguments: Any) -> str:
    """In words, which operation of function(*arguments) is the first with a NaN.

    Without one it is the first that makes an infinite number of finite ones.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        if not jax.device_get(_all_finite(leaf)):
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            return f"{name} has such numbers before the step: an earlier one made them"
    closed = jax.make_jaxpr(function)(*arguments)
    operations = list(_operations(closed.jaxpr))

    def looked_at(values):
        return _evaluate(closed.jaxpr, closed.consts, values)[1]

    # It runs once, and compiles for long.
    look = jax.jit(
        looked_at,
        out_shardings=NamedSharding(mesh, P()),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    lost = jax.device_get(look(jax.tree.leaves(arguments)))
    for kind, what in enumerate(("NaN", "infinite number")):
        found = _first(operations, lost, kind, ())
        if found is not None:
            return f"the first {what} is {_described(*found)}"
    return "numbers are not finite; computed once more, operation by operation, all are"


# --- the program that looks ---


def _operations(jaxpr: core.Jaxpr) -> Iterator[_Operation]:
    """Those that `_evaluate` looks at, in the same order."""
    for eqn in jaxpr.eqns:
        if (inner := _inner(eqn)) is not None:
            yield from _operations(inner)
        elif eqn.primitive.name == "scan":
            yield _Operation(eqn, list(_operations(eqn.params["jaxpr"].jaxpr)))
        elif _is_looked_at(eqn):
            yield _Operation(eqn, [])


def _is_looked_at(eqn: Any) -> bool:
    return eqn.primitive.name not in _MOVING and bool(_floats(eqn.outvars))


def _inner(eqn: Any) -> core.Jaxpr | None:
    name = _INLINED.get(eqn.primitive.name)
    jaxpr = eqn.params[name] if name else None
    return getattr(jaxpr, "jaxpr", jaxpr)


def _floats(variables: Sequence[Any]) -> list[int]:
    """Which of these hold numbers that may be not finite."""
    kinds = [getattr(v.aval, "dtype", None) for v in variables]
    return [i for i, kind in enumerate(kinds) if kind and jnp.issubdtype(kind, jnp.inexact)]


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]):
    """What a jaxpr computes, and of each operation whether that has a NaN, or a new infinity.

    Returns:
      Results; and (2,) booleans of an operation, of a loop a list of those with its axis before.
    """
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(variable):
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    magnitudes: dict[core.Var, Array] = {}  # each found once

    def largest(variable):
        if isinstance(variable, core.Literal):
            return _largest(jnp.asarray(variable.val))
        if variable not in magnitudes:
            magnitudes[variable] = _largest(jnp.asarray(known[variable]))
        return magnitudes[variable]

    lost = []
    for eqn in jaxpr.eqns:
        values = [value(variable) for variable in eqn.invars]
        if eqn.primitive.name == "shard_map":
            results, of_inner = _on_devices(eqn, values)
            lost += of_inner
        elif (inner := _inner(eqn)) is not None:
            closed = eqn.params[_INLINED[eqn.primitive.name]]
            results, of_inner = _evaluate(inner, getattr(closed, "consts", ()), values)
            lost += of_inner
        elif eqn.primitive.name == "scan":
            results, of_body = _looped(eqn.params, values)
            lost.append(of_body)
        else:
            bound = eqn.primitive.get_bind_params(eqn.params)  # a pair before JAX 0.10
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
            results = eqn.primitive.bind(*functions, *values, **parameters)
            results = results if eqn.primitive.multiple_results else [results]
            if _is_looked_at(eqn):
                outputs = [_largest(jnp.asarray(results[i])) for i in _floats(eqn.outvars)]
                inputs = [largest(eqn.invars[i]) for i in _floats(eqn.invars)]
                made = (eqn.outvars[i] for i in _floats(eqn.outvars))
                magnitudes |= zip(made, outputs, strict=True)
                lost.append(_lost(outputs, inputs))
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars], lost


def _lost(outputs: Sequence[Array], inputs: Sequence[Array]) -> Bool[Array, " 2"]:
    """Of the largest magnitudes of what an operation made, and of what it was given."""
    is_nan, is_infinite = jnp.bool_(False), jnp.bool_(False)
    for largest in outputs:
        is_nan, is_infinite = is_nan | jnp.isnan(largest), is_infinite | jnp.isinf(largest)
    for largest in inputs:
        is_infinite &= jnp.isfinite(largest)
    return jnp.stack([is_nan, is_infinite])


def _largest(value: Array) -> Array:
    """One reduction of an array tells of NaN and of infinity."""
    return jnp.max(jnp.abs(value), initial=0.0)


def _looped(parameters: dict[str, Any], values: Sequence[Any]):
    body, consts = parameters["jaxpr"], parameters["num_consts"]
    carried = consts + parameters["num_carry"]

    def once(carry, xs):
        results, lost = _evaluate(body.jaxpr, body.consts, [*values[:consts], *carry, *xs])
        return results[: len(carry)], (results[len(carry) :], lost)

    carry, (ys, lost) = jax.lax.scan(
        once,
        list(values[consts:carried]),
        list(values[carried:]),
        length=parameters["length"],
        reverse=parameters["reverse"],
    )
    return [*carry, *ys], lost


def _on_devices(eqn: Any, values: Sequence[Any]):
    """A shard_map; an operation is lost where it is on any device."""
    parameters, axes = eqn.params, eqn.params["newly_manual_axes"]
    everywhere = P(tuple(axes))

    def on_device(*arguments):
        results, lost = _evaluate(parameters["jaxpr"], (), arguments)
        return results, jax.tree.map(lambda flags: flags[None], lost)

    results, lost = jax.shard_map(
        on_device,
        mesh=parameters["mesh"],
        in_specs=tuple(parameters["in_specs"]),
        out_specs=(list(parameters["out_specs"]), everywhere),
        axis_names=set(axes),
        check_vma=parameters["check_vma"],
    )(*values)
    return results, jax.tree.map(lambda flags: flags.any(axis=0), lost)


# --- what it has seen ---


def _first(operations: Sequence[_Operation], lost: Sequence[Any], kind: int, at: tuple[int, ...]):
    """The first operation that is lost, and of each loop around it (operation, iteration)."""
    for operation, flags in zip(operations, lost, strict=True):
        if not operation.body:
            if operation.eqn.primitive.name != "scan" and np.asarray(flags)[at][kind]:
                return operation, []
            continue
        length = operation.eqn.params["length"]
        order = range(length)
        for i in reversed(order) if operation.eqn.params["reverse"] else order:
            found = _first(operation.body, flags, kind, (*at, i))
            if found is not None:
                inside, loops = found
                return inside, [(operation, i), *loops]
    return None


def _described(operation: _Operation, loops: Sequence[tuple[_Operation, int]]) -> str:
    said = f"the result of {operation.eqn.primitive.name} at {_line(operation.eqn)}"
    for loop, i in loops:
        said += (
            f", in round {i + 1} of {loop.eqn.params['length']} of the loop at {_line(loop.eqn)}"
        )
    stacks = [_stack(around.eqn) for around in (operation, *(loop for loop, _ in loops))]
    return said + (", on the way back" if any("transpose(" in s for s in stacks) else "")


def _stack(eqn: Any) -> str:
    return str(getattr(eqn.source_info, "name_stack", ""))


def _line(eqn: Any) -> str:
    """Where somebody wrote this, who is none of the libraries."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    for frame in frames:
        if not frame.file_name.startswith(tuple(_LIBRARIES)):
            file = Path(frame.file_name)
            return f"{file.parent.name}/{file.name}:{frame.line_num} ({frame.function_name})"
    return "a place that is not known"
