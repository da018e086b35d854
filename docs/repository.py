"""Hooks of mkdocs that bring files outside `docs/` into the site.

Pages link to the rest of the repository by relative paths, as they are read there. In the site a
notebook, the changelog and CONTRIBUTING become pages, and any other file that a page links to is
copied.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Page of the site -> its path in the repository.
OUTSIDE = {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md")}


def on_files(files, config):
    """Add the pages that are outside `docs/`."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        OUTSIDE[page] = f"notebooks/{path.name}"
        files.append(File.generated(config, page, content=markdown(json.loads(path.read_text()))))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(text, page, config, files):
    """Rewrite the links that leave `docs/`."""
    here = page.file.src_uri
    folder = posixpath.dirname(OUTSIDE.get(here, f"docs/{here}"))

    def rewrite(match):
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        target = path.removeprefix("docs/")
        if path.startswith("notebooks/") and path.endswith(".ipynb"):
            target = path.removesuffix(".ipynb") + ".md"
        elif target == path and (ROOT / path).is_file() and not files.get_file_from_path(path):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return LINK.sub(rewrite, text)


def markdown(notebook):
    """Return a notebook as a page: code, text and pictures in their order."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                picture = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output" src="data:image/png;base64,{picture}">')
    return "\n\n".join(parts)
