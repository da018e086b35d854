"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import q4jax
import q4jax.linen


@pytest.mark.parametrize("name", q4jax.__all__)
def test_every_name_resolves(name):
    assert getattr(q4jax, name) is not None
    assert name in dir(q4jax)


def test_dir_shows_public_names_only():
    shown = [name for name in dir(q4jax) if not name.startswith("__")]
    assert sorted(shown) == sorted(q4jax.__all__)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (q4jax, "trainable_parameters", "trainable_report"),
        (q4jax.linen, "quantize_params", "quantize_model"),
        (q4jax.linen, "plan_params", "plan_quantization"),
        (q4jax.linen, "place_weights", "merge_quantized"),
    ],
)
def test_former_names_warn(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {module.__name__}.{new}"):
        assert getattr(module, old) is getattr(module, new)


def test_fold_is_kernel_axes_with_its_former_names():
    with pytest.warns(DeprecationWarning, match="q4jax.Fold is now q4jax.KernelAxes"):
        fold = q4jax.Fold((4, 64, 128), inputs=(1,), batch=(0,))
    assert isinstance(fold, q4jax.KernelAxes)
    assert (fold.in_axes, fold.batch_axes, fold.matrix) == ((1,), (0,), (128, 64))


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="'q4jax' has no attribute 'quantise_4bit'"):
        _ = q4jax.quantise_4bit
    with pytest.raises(AttributeError, match="'q4jax.linen' has no attribute 'Dense'"):
        _ = q4jax.linen.Dense


def test_import_leaves_flax_nnx_and_orbax_out():
    code = """
import sys, flax
before = set(sys.modules)
import q4jax
new = set(sys.modules) - before
print([m for m in ("flax.nnx", "orbax.checkpoint", "jax.experimental.pallas") if m in new])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
