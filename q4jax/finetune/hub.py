"""Models of the Hugging Face hub, by `org/name` or `org/name@revision`.

huggingface_hub is imported when a model is asked for. Its own settings hold: `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HOME` and others. Files that are in its cache are not downloaded again.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from q4jax.finetune.requirements import require
from q4jax.finetune.settings import SettingsError
from q4jax.interop.huggingface.tokenizer import TOKENIZER_FILES

_NAME = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^@\s]+))?")
_SMALL = ["config.json", "generation_config.json", *TOKENIZER_FILES]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# Other forms of the same weights, which some repositories have in folders.
_OTHERS = ["*/*"]


class HubModel(NamedTuple):
    """A model of the hub.

    Attributes:
      name: `org/name`.
      revision: a branch, a tag or a commit; None: the main branch.
    """

    name: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "HubModel | None":
        """Return the model that a text names; None if it is no such name.

        Examples:
          >>> HubModel.parse("org/name@v1")
          HubModel(name='org/name', revision='v1')
          >>> HubModel.parse("./folder/name") is None
          True
        """
        found = _NAME.fullmatch(text)
        return None if found is None else cls(found["name"], found["revision"])

    def description(self) -> Path:
        """Download the config and the tokenizer; return their directory.

        Raises:
          SettingsError: there is no such model or revision, it needs a token, or the hub cannot be
            reached; huggingface_hub is not installed.
        """
        return self._download(_SMALL)

    def weights(self) -> Path:
        """Download the weights too; return the directory. Raises what `description` does."""
        return self._download([*_SMALL, *_WEIGHTS])

    def _download(self, patterns: list[str]) -> Path:
        hub = require("huggingface_hub", "hub", f"--model {self.name} is no directory here")
        errors = require("huggingface_hub.errors", "hub", "--model")
        try:
            # The variable is read here, since the package reads it only when it is imported.
            folder = hub.snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=patterns,
                ignore_patterns=_OTHERS,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        except errors.GatedRepoError:
            raise self._error("needs a token of an account that may read it: HF_TOKEN") from None
        except errors.RepositoryNotFoundError:
            raise self._error("is neither a directory here nor a model on the hub") from None
        except errors.RevisionNotFoundError:
            raise self._error(f"has no revision {self.revision!r} on the hub") from None
        except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
            text = " ".join(str(error).split())
            raise self._error(f"cannot be downloaded: {text}") from None
        return Path(folder)

    def _error(self, text: str) -> SettingsError:
        return SettingsError(f"--model {self.name} {text}")
