"""Hooks of the documentation site (mkdocs.yml).

Pages are written for GitHub: links are relative to the file. Files outside of docs/ that are pages
of the site are listed in `PAGES`; links to others lead to the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
#: {page of the site: file of the project}, of those that are not in docs/.
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "models/pretrained.md": "models/pretrained/README.md",
    "models/strong.md": "models/strong/README.md",
    "roadmap.md": "ROADMAP.md",
    "security.md": "SECURITY.md",
}
#: A fenced block, which is left alone, or the target of a link.
LINK = re.compile(r"^```.*?^```|(?<=\]\()(?P<target>[^)\s]+)(?=\))", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make the links of a page those of the site."""
    uri = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        return match[0] if target is None else translate(target, uri, config.extra["repository"])

    return LINK.sub(replace, markdown)


def translate(target: str, page: str, repository: str) -> str:
    """The target of a link on the site.

    Args:
        target: relative to the file of the page, as GitHub takes it.
        page: of the site, such as "models/strong.md".
        repository: address of the project's files.
    """
    path, hash_, heading = target.partition("#")
    if ":" in target or not path:
        return target
    own = PAGES.get(page, f"docs/{page}")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
    pages = {path: page for page, path in PAGES.items()}
    if file not in pages and not file.startswith("docs/"):
        return f"{repository}{file}{hash_}{heading}"
    uri = pages.get(file, file.removeprefix("docs/"))
    return posixpath.relpath(uri, posixpath.dirname(page) or ".") + hash_ + heading


class Doctests(griffe.Extension):
    """Puts the examples of docstrings into code blocks; to Markdown `>>>` is a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with a fence around each paragraph that starts with `>>>`.

    >>> fenced("Text.\\n\\n>>> 1 + 1\\n2\\n\\nMore.")
    'Text.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n\\nMore.'
    """
    paragraphs = [
        f"```pycon\n{paragraph}\n```" if paragraph.startswith(">>>") else paragraph
        for paragraph in text.split("\n\n")
    ]
    return "\n\n".join(paragraphs)
