"""What the site needs beyond plain Markdown: mathematics as MathML, and the changelog as a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

# What pymdownx.arithmatex leaves: \(...\) in a span, \[...\] in a div.
_MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add CHANGELOG.md, which lies in the root for those who read it there."""
    changelog = Path(config.config_file_path).parent / "CHANGELOG.md"
    files.append(File.generated(config, "changelog.md", abs_src_path=str(changelog)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of the changelog, which are relative to the root, point into the site."""
    return markdown.replace("](docs/", "](") if page.file.src_uri == "changelog.md" else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers show without a script."""
    return _MATHS.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    latex = html.unescape(found[2]).strip()
    return convert(latex, display="inline" if found[1] == "span" else "block")
