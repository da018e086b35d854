"""What `convert --quantize` makes 4-bit, against what transformers does, for all known classes."""

import numpy as np
import pytest

from q4jax.cli.main import main
from tests.support import tiny_transformers

# Conv1D, embeddings by other names, experts, routers, mixers, norms of matrices, tied and biased
# heads, `wo` of T5, parts with configs of their own, names that transformers changes.
_QUICK = """GPT2LMHeadModel GPT2ForTokenClassification LlamaModel LlamaForSequenceClassification
MistralForTokenClassification OlmoModel Gemma2ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM
MixtralForCausalLM Qwen2MoeForCausalLM Qwen3NextForCausalLM GptOssForCausalLM GraniteMoeForCausalLM
DeepseekV3ForCausalLM CohereForCausalLM GPTNeoXForCausalLM BloomForCausalLM OPTForCausalLM
MptForCausalLM PhiForCausalLM MambaForCausalLM NemotronHForCausalLM Lfm2ForCausalLM
T5ForConditionalGeneration BartForConditionalGeneration BertForMaskedLM
BertForSequenceClassification RobertaForMaskedLM DistilBertForQuestionAnswering
DebertaV2ForSequenceClassification ModernBertForMaskedLM ViTForImageClassification
WhisperForConditionalGeneration LlavaForConditionalGeneration Gemma3ForConditionalGeneration
Qwen2_5_VLForConditionalGeneration"""
QUICK = _QUICK.split()


def pytest_generate_tests(metafunc):
    try:
        cases = tiny_transformers.cases()
    except ImportError:  # the tests are skipped
        cases = [("", name) for name in QUICK]
    marks = [() if name in QUICK else pytest.mark.heavy for _, name in cases]
    parameters = [pytest.param(*case, marks=m) for case, m in zip(cases, marks, strict=True)]
    metafunc.parametrize(("model_type", "name"), parameters)


def logits(model):
    """Return the first output of a model for fixed inputs, in train mode without dropout.

    bitsandbytes' code for a CPU computes in bfloat16 in eval mode.
    """
    import inspect

    import torch

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    accepted = inspect.signature(model.forward).parameters
    ids = torch.tensor(np.random.default_rng(0).integers(5, 100, (1, 20)))
    inputs = {name: ids for name in ("input_ids", "decoder_input_ids") if name in accepted}
    if "input_ids" not in inputs:
        inputs["pixel_values"] = torch.ones(1, 3, 32, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)[0].float().numpy()


def test_like_transformers(model_type, name, tmp_path):
    quantized = tiny_transformers.quantize_there(
        tmp_path, tiny_transformers.tiny(model_type, name), max_shard_size="100KB"
    )
    arguments = ["convert", tmp_path / "full", tmp_path / "ours", "--to", "huggingface"]
    arguments += ["--quantize", "nf4", "--plain", "--quiet"]
    assert main([str(argument) for argument in arguments]) == 0
    theirs, ours = (tiny_transformers.read(tmp_path / side) for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        if "quant_state" not in key:
            assert tensor.dtype == ours[key].dtype, key
            np.testing.assert_array_equal(tensor, ours[key], err_msg=key)
    again = tiny_transformers.load(type(quantized), tmp_path / "ours")
    classes = [[type(m) for m in model.modules()] for model in (quantized, again)]
    assert classes[0] == classes[1]
    try:
        expected = logits(quantized)
    except Exception as error:  # Mamba and others cannot run their own 4-bit weights
        with pytest.raises(type(error)):
            logits(again)
    else:
        np.testing.assert_array_equal(logits(again), expected)
