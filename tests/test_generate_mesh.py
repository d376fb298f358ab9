"""Generation on a mesh: parameters lie as in training, and the texts are those of one device."""

import dataclasses

import jax

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax.generation import Generator
from tests import tiny

PROMPTS = [[5, 6, 7], [300, 20, 10, 4, 4, 4, 9, 8, 31], [17] * 13 + [18, 19], [3], [8, 7]]


def test_texts_are_those_of_one_device():
    sizes = {"moe.n_ffn": 4, "model.moe_every": 2}
    config = tiny.config(**sizes, **{f"mesh.{axis}": 2 for axis in mesh_lib.AXES})
    warm = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}
    settings = dataclasses.replace(config.generate, **warm)
    alone = model_lib.build(config, dispatch="dropless")
    params = jax.jit(alone.init)(jax.random.key(0))
    texts = Generator(alone, params)(PROMPTS, settings)

    mesh = mesh_lib.make_mesh(config)
    model = model_lib.build(config, mesh, "dropless")
    sharded = jax.device_put(params, mesh_lib.shardings(model.described, mesh))
    generate = Generator(model, sharded, mesh)
    assert generate(PROMPTS, settings) == texts
    ended = generate(PROMPTS, settings, end=texts[0][3], limits=[8, 2, 8, 8, 8])
    assert ended[1] == texts[1][: len(ended[1])] and len(ended[1]) <= 2
    kept = jax.tree.leaves(generate._programs._params["layers"][0]["moe"]["ffn"])
    assert all(len(p.addressable_shards[0].data.ravel()) * 4 == p.size for p in kept)
