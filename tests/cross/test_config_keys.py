"""No entry of a config class of transformers is passed over in silence."""

import json

import pytest

from q4jax.models.decoder.describe import IRRELEVANT
from q4jax.models.decoder.families import FAMILIES
from q4jax.models.decoder.families.default_entries import default_entries
from tests.models.vectors.make_defaults import defaults_of
from tests.support.random_weights import entries_read


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_each_entry_is_read_or_known_to_be_irrelevant(kind):
    import transformers

    used = entries_read(kind)
    used |= {"max_seq_len"}  # the context, which nothing limits in MPT
    names = set(transformers.AutoConfig.for_model(kind).to_dict())
    common = set(transformers.PretrainedConfig().to_dict()) - {"tie_word_embeddings"}
    assert names - common - used - IRRELEVANT == set()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_missing_entries_are_those_of_transformers(kind):
    assert default_entries(kind) == json.loads(json.dumps(defaults_of(kind)))
