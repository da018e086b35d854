"""Rotary embeddings against complex multiplication in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.models.decoder.config import RopeScaling
from q4jax.models.decoder.rope import inverse_frequencies, rotate, rotation

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def rope_of(config):
    [rope] = {layer.mixer.rope for layer in config.decoder.layers}
    return rope


def frequencies_one_by_one(config):
    """The published rule, written with branches and wavelengths."""
    scaling, out = config.rope_scaling, []
    for pair in range(config.head_dim // 2):
        freq = config.rope_theta ** (-2 * pair / config.head_dim)
        if scaling is None:
            out.append(freq)
        elif scaling.rope_type == "linear":
            out.append(freq / scaling.factor)
        else:
            wavelength = 2 * math.pi / freq
            context = scaling.original_max_position_embeddings
            if wavelength < context / scaling.high_freq_factor:
                out.append(freq)
            elif wavelength > context / scaling.low_freq_factor:
                out.append(freq / scaling.factor)
            else:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                out.append((1 - smooth) * freq / scaling.factor + smooth * freq)
    return np.array(out)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), LLAMA3])
def test_rotation_is_multiplication_by_a_unit_complex_number(config, scaling):
    config = dataclasses.replace(config, head_dim=32, rope_scaling=scaling)
    rope = rope_of(config)
    np.testing.assert_allclose(inverse_frequencies(rope), frequencies_one_by_one(config), rtol=1e-6)

    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 32))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 8, 30, 31, 63]])
    angle = np.asarray(positions)[:, :, None, None] * frequencies_one_by_one(config)
    wide = np.asarray(x, np.float64)
    turned = (wide[..., :16] + 1j * wide[..., 16:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, rotation(positions, rope)), expected, atol=2e-5)


def test_llama3_covers_all_three_bands(config):
    config = dataclasses.replace(config, head_dim=32, rope_scaling=LLAMA3)
    plain = inverse_frequencies(rope_of(dataclasses.replace(config, rope_scaling=None)))
    ratio = inverse_frequencies(rope_of(config)) / plain
    assert np.isclose(ratio, 1).any()
    assert np.isclose(ratio, 1 / 8).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


def test_rotation_keeps_the_dtype_of_x(config):
    x = jnp.ones((1, 2, 1, config.head_dim), jnp.bfloat16)
    assert rotate(x, rotation(jnp.arange(2)[None], rope_of(config))).dtype == jnp.bfloat16
