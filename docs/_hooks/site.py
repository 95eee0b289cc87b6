"""What the site needs beyond plain Markdown: MathML, the changelog and the notebooks as pages."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

# What pymdownx.arithmatex leaves: \(...\) in a span, \[...\] in a div.
_MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add CHANGELOG.md and the notebooks, which lie where they are found without the site."""
    root = Path(config.config_file_path).parent
    changelog = str(root / "CHANGELOG.md")
    files.append(File.generated(config, "changelog.md", abs_src_path=changelog))
    for notebook in sorted((root / "examples" / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        page, pictures = notebook_page(notebook.stem, cells)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def notebook_page(name: str, cells: list[dict[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    pictures: dict[str, bytes] = {}

    def parts() -> Iterator[str]:
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                yield source
                continue
            yield f"```python\n{source}\n```"
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    file = f"{name}-{len(pictures) + 1}.png"
                    pictures[file] = base64.b64decode("".join(data["image/png"]))
                    yield f"![What the code above draws]({file})"
                elif "text/html" in data:
                    yield "".join(data["text/html"])
                else:
                    text = "".join(data.get("text/plain") or output.get("text", ""))
                    yield f"```text\n{text.rstrip()}\n```"
        yield f"This page is `examples/notebooks/{name}.ipynb`, run by the tests."

    return "\n\n".join(parts()) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of the changelog, which are relative to the root, point into the site."""
    return markdown.replace("](docs/", "](") if page.file.src_uri == "changelog.md" else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers show without a script."""
    return _MATHS.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    latex = html.unescape(found[2]).strip()
    return convert(latex, display="inline" if found[1] == "span" else "block")
