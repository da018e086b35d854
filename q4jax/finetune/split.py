"""Which documents are trained on, and which are held out."""

from collections.abc import Sequence

import numpy as np

from q4jax.finetune.documents import Document
from q4jax.finetune.settings import SettingsError


def split(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Return documents to train on, and held-out ones.

    Of a file of text, the last part is held out; of JSON lines, whole documents, chosen by `seed`.

    Raises:
      SettingsError: there is one JSON line only.

    Examples:
      >>> from q4jax.finetune.documents import Piece
      >>> text = Document("", (Piece("0123456789", True),), is_file=True)
      >>> [part[0].pieces[0].text for part in split([text], 0.2, seed=0)]
      ['01234567', '89']
    """
    if share == 0:
        return list(documents), []
    train: list[Document] = []
    held_out: list[Document] = []
    lines = [number for number, document in enumerate(documents) if not document.is_file]
    if len(lines) == 1:
        raise SettingsError(
            f"{documents[lines[0]].where} is the only document of its kind, of which none can be "
            "held out: pass --eval-data, or --held-out 0"
        )
    count = max(1, round(share * len(lines))) if lines else 0
    chosen = {lines[at] for at in np.random.default_rng(seed).permutation(len(lines))[:count]}
    for number, document in enumerate(documents):
        if document.is_file:
            [piece] = document.pieces
            cut = len(piece.text) - max(1, round(share * len(piece.text)))
            for part, text in ((train, piece.text[:cut]), (held_out, piece.text[cut:])):
                if text:
                    part.append(document._replace(pieces=(piece._replace(text=text),)))
        else:
            (held_out if number in chosen else train).append(document)
    return train, held_out
