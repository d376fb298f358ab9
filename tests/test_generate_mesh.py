"""Generation on a mesh: parameters lie as in training, and the texts are those of one device."""

import dataclasses
import functools

import jax
import pytest

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax.generation import Generator
from tests import tiny

PROMPTS = [[5, 6, 7], [300, 20, 10, 4, 4, 4, 9, 8, 31], [17] * 13 + [18, 19], [3], [8, 7]]


@functools.cache
def texts_of_one_device():
    config = case(())
    model = model_lib.build(config, dispatch="dropless")
    return [Generator(model, params())(PROMPTS, s) for s in every_setting(config)]


def case(axes):
    sizes = {f"mesh.{axis}": size for axis, size in zip(mesh_lib.AXES, axes, strict=False)}
    return tiny.config(**{"moe.n_ffn": 4, "model.moe_every": 2, **sizes})


@functools.cache
def params():
    model = model_lib.build(case(()))
    return jax.jit(functools.partial(model_lib.init, model))(jax.random.key(0))


def every_setting(config):
    greedy = config.generate
    warm = dataclasses.replace(greedy, temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    return greedy, warm


@pytest.mark.parametrize("axes", [(2, 2, 2)])
def test_texts_are_those_of_one_device(axes):
    config = case(axes)
    mesh = mesh_lib.make_mesh(config)
    model = model_lib.build(config, mesh, "dropless")
    sharded = jax.device_put(params(), mesh_lib.shardings(params(), mesh))
    generate = Generator(model, sharded, mesh)
    for settings, texts in zip(every_setting(config), texts_of_one_device(), strict=True):
        assert generate(PROMPTS, settings) == texts
        ended = generate(PROMPTS, settings, end=texts[0][3], limits=[8, 2, 8, 8, 8])
        assert ended[1] == texts[1][: len(ended[1])] and len(ended[1]) <= 2
    kept = jax.tree.leaves(generate._programs._params["layers"][0]["moe"]["ffn"])
    assert all(len(p.addressable_shards[0].data.ravel()) * 4 == p.size for p in kept)
