"""docs/fidelity.md says what benchmarks/results/fidelity.json holds, and the benchmark can run."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from q4jax.models import Llama, LlamaConfig

ROOT = Path(__file__).parents[2]

import fidelity_tables  # noqa: E402

RESULTS = json.loads(fidelity_tables.RESULTS.read_text())


def test_every_figure_of_the_page_is_in_the_results():
    page = (ROOT / "docs" / "fidelity.md").read_text("utf-8")
    for name, passage in fidelity_tables.tables(RESULTS).items():
        assert re.sub(r"\s+", " ", passage) in re.sub(r"\s+", " ", page), f"{name}:\n{passage}"
        page = page.replace(passage, "")
    assert not re.findall(r"\d+\.\d+|\d+%", page)


def test_double_quantization_costs_less_than_one_percent():
    found = {(r["scheme"], r["blocksize"]): r["perplexity"] for r in RESULTS["perplexity"]}
    blocksizes = [blocksize for scheme, blocksize in found if scheme == "nf4"]
    assert blocksizes == [64, 128, 256, 512, 1024, 2048, 4096]
    for blocksize in blocksizes:
        assert abs(found["nf4+dq", blocksize] / found["nf4", blocksize] - 1) < 0.01


def test_errors_are_those_of_the_formats():
    models = [record["model"] for record in RESULTS["layers"]]
    assert [models.count(name) for name in ("normal", "MiniLM", "SmolLM2")] == [1, 36, 210]
    for record in RESULTS["layers"]:
        errors = record["errors"]
        # None is much below a normal weight's, and none has outliers enough to double it.
        assert 0.09 < errors["nf4"] < 0.105, record
        assert 0.12 < errors["fp4"] < 0.15, record
        for scheme in ("nf4", "fp4"):
            assert abs(errors[f"{scheme}+dq"] / errors[scheme] - 1) < 0.004, record


@pytest.mark.heavy
def test_the_benchmark_on_a_tiny_model(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    import fidelity

    monkeypatch.setattr(fidelity, "BLOCKSIZES", (64, 4096))
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    windows = np.asarray(jax.random.randint(jax.random.key(0), (4, 33), 0, 97))
    w = np.random.default_rng(0).standard_normal((64, 128), np.float32)
    results = {
        "layers": fidelity.layer_errors("normal", {"w": w})
        + fidelity.layer_errors("MiniLM", {"encoder.layer.0.output.dense.weight": w})
        + fidelity.layer_errors("SmolLM2", {"model.layers.0.mlp.up_proj.weight": w}),
        "perplexity": fidelity.perplexities(Llama(config, rngs=nnx.Rngs(0)), windows),
        "tokens": windows.size,
        "python": "",
        "jax": "",
    }
    weight = fidelity.q4jax.Params4bit.quantize(w, 64, False, "nf4").dequantize()
    expected = np.linalg.norm(weight - w) / np.linalg.norm(w)
    assert results["layers"][0]["errors"]["nf4"] == pytest.approx(expected, abs=1e-6)
    dense, first, *rest = results["perplexity"]
    assert dense["perplexity"] != first["perplexity"]
    assert (first["scheme"], first["blocksize"], first["bits"]) == ("nf4", 64, 4.5)
    assert len(rest) == 5
    fidelity_tables.plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "| 4096 |" in fidelity_tables.tables(results)["perplexity"]
