"""For mkdocs: brings what lies outside `docs/` into the site, and keeps the links to it whole.

Pages link to the rest of the repository by relative paths, as they are read there. In the site a
notebook becomes a page, and any other file that a page links to is copied.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Page of the site -> where it lies in the repository.
OUTSIDE = {"CHANGELOG.md": "CHANGELOG.md"}


def on_files(files, config):
    """Adds the pages that do not lie in `docs/`."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        OUTSIDE[page] = f"notebooks/{path.name}"
        files.append(File.generated(config, page, content=markdown(json.loads(path.read_text()))))
    content = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "CHANGELOG.md", content=content))
    return files


def on_page_markdown(text, page, config, files):
    """Rewrites the links that leave `docs/`."""
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
    """A notebook as a page: code, text and pictures in their order."""
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
