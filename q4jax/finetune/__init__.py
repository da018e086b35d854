"""Fine-tune a language model with QLoRA, from a name or a directory to an adapter.

`python -m q4jax finetune` is `run`. The parts may be used alone: documents and chat templates,
packing, the loss, a step of training.
"""

from q4jax.finetune.base import Base
from q4jax.finetune.batches import Batches
from q4jax.finetune.chat import ChatTemplate
from q4jax.finetune.cross_entropy import loss
from q4jax.finetune.documents import Document, Piece, read_documents
from q4jax.finetune.memory import Estimate, estimate
from q4jax.finetune.optimizer import make_optimizer
from q4jax.finetune.packing import Rows, pack
from q4jax.finetune.placement import Placement
from q4jax.finetune.restore import restore
from q4jax.finetune.run import resume, run
from q4jax.finetune.settings import Settings, SettingsError
from q4jax.finetune.step import Measured, evaluate, train_step
from q4jax.finetune.tokens import Tokenizer, Tokens

__all__ = [
    "Base",
    "Batches",
    "ChatTemplate",
    "Document",
    "Estimate",
    "Measured",
    "Piece",
    "Placement",
    "Rows",
    "Settings",
    "SettingsError",
    "Tokenizer",
    "Tokens",
    "estimate",
    "evaluate",
    "loss",
    "make_optimizer",
    "pack",
    "read_documents",
    "restore",
    "resume",
    "run",
    "train_step",
]
