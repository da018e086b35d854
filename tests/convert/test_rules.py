"""Rules by regular expression: the first that matches decides, and none may be idle."""

import pytest
from flax import nnx

import q4jax
from q4jax import QuantRule
from q4jax.nnx.traverse import iter_modules


def model():
    rngs = nnx.Rngs(0)

    def layer():
        return nnx.Dict(q=nnx.Linear(64, 64, rngs=rngs), up=nnx.Linear(64, 64, rngs=rngs))

    return nnx.Dict(
        layers=nnx.List([layer(), layer()]),
        embed=nnx.Embed(8, 64, rngs=rngs),
        conv=nnx.Conv(4, 4, (3,), rngs=rngs),
        head=nnx.Linear(64, 8, rngs=rngs),
    )


def test_the_first_rule_that_matches_decides():
    rules = [
        QuantRule(r"layers\.0\.up", skip=True),
        QuantRule(r".*\.up", quant_type="fp4", blocksize=32, compress_statistics=False),
        QuantRule(r"layers\..*", dtype="bfloat16"),
        QuantRule("embed", embeddings=True),
    ]
    small = q4jax.quantize_model(model(), rules)
    tags = {
        path: module.weight.quant_state.spec.tag()
        for path, module in iter_modules(small)
        if hasattr(module, "weight")
    }
    assert tags == {
        "embed": "nf4_b64_n256_float32_8x64",
        "layers.0.q": "nf4_b64_n256_float32_64x64",
        "layers.1.q": "nf4_b64_n256_float32_64x64",
        "layers.1.up": "fp4_b32_n0_float32_64x64",
    }
    assert (small.layers[0].q.dtype, small.layers[1].up.dtype) == ("bfloat16", None)
    plan = q4jax.plan_quantization(model(), rules)
    assert {d.path: d.reason for d in plan.kept} == {
        "conv": "no rule matches it",
        "head": "no rule matches it",
        "layers.0.up": r"rule 'layers\\.0\\.up' skips it",
    }
    assert str(plan).count("\n") == 6


def test_rules_that_match_nothing_are_named_with_what_there_is():
    for rules in ([QuantRule(r"layers\.5\..*"), QuantRule()], [QuantRule(r"layers\.5\..*")]):
        with pytest.raises(ValueError, match=r"no layer matches 'layers.*the layers are: conv"):
            q4jax.quantize_model(model(), rules)
    with pytest.raises(ValueError, match=r"no layer matches 'heads'.*layers\.1\.up"):
        q4jax.quantize_model(model(), [QuantRule("heads", skip=True), QuantRule()])
    with pytest.raises(ValueError, match=r"no layer matches 'up'.*with the whole path"):
        q4jax.quantize_model(model(), [QuantRule("up")])
    with pytest.raises(ValueError, match=r"matched no layer.*head \(Linear\): kept: rule '.*' ski"):
        q4jax.quantize_model(model(), [QuantRule(skip=True)])


def test_a_rule_that_names_what_cannot_be_quantized():
    message = r"rule 'conv' matches conv \(Conv\), which cannot be quantized: a convolution"
    with pytest.raises(ValueError, match=message):
        q4jax.quantize_model(model(), [QuantRule("conv"), QuantRule()])
    plan = {d.path: d for d in q4jax.plan_quantization(model(), [QuantRule()])}
    assert plan["conv"].reason == "a convolution"
    assert plan["embed"].reason == "an embedding; QuantRule(embeddings=True) takes it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "a("}, r"'a\(' is no regular expression: missing \)"),
        ({"pattern": 3}, "a pattern must be a string, got 3"),
        ({"blocksize": 100}, "invalid blocksize 100"),
        ({"quant_type": "int4"}, "got 'int4'"),
    ],
)
def test_rules_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantRule(**settings)


def test_arguments_that_are_refused():
    with pytest.raises(TypeError, match="a QuantConfig or a list of QuantRules, got 'nf4'"):
        q4jax.quantize_model(model(), "nf4")
    with pytest.raises(TypeError, match=r"\['blocksize'\] beside rules"):
        q4jax.quantize_model(model(), [QuantRule()], blocksize=32)
