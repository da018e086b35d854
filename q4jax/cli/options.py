"""The options of `python -m q4jax finetune`, one for each field of its settings."""

import argparse
import dataclasses
from typing import Any, NoReturn

from q4jax.finetune.settings import Rule, Settings, flag

_UNSET = object()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting; `given_settings` reads those that were given."""
    for field in dataclasses.fields(Settings):
        text, default = field.metadata["help"], field.default
        shown = default not in (dataclasses.MISSING, None, (), False)
        text += f" (default: {default})" if shown else ""
        options: dict[str, Any] = {"dest": field.name, "default": _UNSET}
        if field.type is bool:
            options |= {"action": "store_true"}
        elif field.type == tuple[str, ...]:
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            options |= {
                "metavar": "N" if field.type is int else "X" if field.type is float else "TEXT"
            }
        if field.type in (int, float, int | None):
            options["type"] = _number(field)
        parser.add_argument(flag(field.name), help=text.replace("%", "%%"), **options)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line names."""
    names = [field.name for field in dataclasses.fields(Settings)]
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value is not _UNSET}


def _number(field: "dataclasses.Field[Any]") -> Any:
    rule: Rule | None = field.metadata["rule"]
    what = "a number" if rule is None else rule.what

    def parse(text: str) -> Any:
        try:
            return float(text) if field.type is float else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None

    return parse
