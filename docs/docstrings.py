"""For mkdocstrings: puts docstrings into the form that its parser knows.

The docstrings here say "Example:" and describe arguments together, as in "a, b: as for `f`".
"""

import re

import griffe

TOGETHER = re.compile(r"^( +)((?:\w+, )+\w+): (.*)$", re.M)


class HouseStyle(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj, **_):
        """Called for every object that is found."""
        if obj.docstring and not obj.is_alias:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = TOGETHER.sub(separate, text)


def separate(match):
    """One line for each argument."""
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
