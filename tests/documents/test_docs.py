"""The documentation works: code, page by page; commands; the outputs shown; the site.

`<!-- not run: REASON -->` before a block skips it, `<!-- slow: REASON -->` leaves it to --run-slow.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import typer

from lirefs.cli import app as cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
}
# Commands are run on these pages only: elsewhere they take minutes or need other data.
COMMANDS_RUN = re.compile(r"docs/(start|how-to/.*)\.md")
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|slow): (?P<reason>[^\n]*) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<shown>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
REAL_MODEL = "smollm2-135m"
# Replacements for the real model when its weights are not wanted.
STAND_INS = {REAL_MODEL: "organism", "[20, 21, 22]": "[1, 2, 3]"}


@dataclass
class Block:
    """A block of code, and the output that the page shows after it."""

    language: str
    code: str
    shown: str | None
    line: int
    mark: str | None
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    return [
        Block(
            found["language"],
            found["code"],
            found["shown"],
            text[: found.start("code")].count("\n"),
            found["mark"],
            found["reason"],
        )
        for found in BLOCK.finditer(text)
    ]


@dataclass
class Page:
    """A page that is being run: one namespace, one folder, and blocks in order."""

    name: str
    stood_in: bool
    folder: Path
    namespace: dict[str, object] = field(default_factory=lambda: {"__name__": "__main__"})
    outputs: dict[int, str] = field(default_factory=dict)

    def run_to(self, line: int) -> str:
        """Run the blocks up to the one at a line, except those that have run already."""
        text = PAGES[self.name]
        for old, new in STAND_INS.items() if self.stood_in else ():
            text = text.replace(old, new)
        for block in blocks_of(text):
            wanted = block.line == line or (block.line < line and block.mark is None)
            if wanted and runs(self.name, block) and block.line not in self.outputs:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    self.run(block)
                self.outputs[block.line] = out.getvalue()
        return self.outputs[line]

    def run(self, block: Block) -> None:
        if block.language == "python":
            source = "\n" * block.line + block.code  # a traceback then names the page's line
            exec(compile(source, self.name, "exec"), self.namespace)
            return
        for arguments in commands_of(block.code):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sys, "argv", ["lirefs", *arguments])
                with pytest.raises(SystemExit) as stop:
                    cli.main()
            assert not stop.value.code, arguments


def runs(page: str, block: Block) -> bool:
    return block.language == "python" or bool(COMMANDS_RUN.fullmatch(page))


def commands_of(script: str) -> list[list[str]]:
    """Arguments of every `lirefs` in a shell script, however it is started."""
    found = []
    for line in script.replace("\\\n", " ").replace("$(which lirefs)", "lirefs").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                starts = [i for i, one in enumerate(command) if one.split("/")[-1] == "lirefs"]
                found += [command[starts[0] + 1 :]] if starts else []
                command = []
            else:
                command.append(word)
    return found


def parse(arguments: list[str]) -> None:
    """Parse a command line with the real commands without running anything."""
    command, name, context = typer.main.get_command(cli.app), "lirefs", None
    while True:
        with contextlib.suppress(typer.Exit):  # --help
            context = command.make_context(name, list(arguments), parent=context)
            if hasattr(command, "resolve_command"):
                rest = [*context._protected_args, *context.args]
                name, command, arguments = command.resolve_command(context, rest)
                continue
        return


def without_marks(synopsis: str) -> str:
    """Turn a synopsis into a command that can be parsed, with all optional parts."""
    return re.sub(r"\[OPTIONS\]|\bCOMMAND\b|\.\.\.|[][]", "", synopsis)


def agree(shown: str, printed: str) -> bool:
    """Whether an output is what a page shows, where `...` stands for anything."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(shown, printed, flags)


def cases() -> list[object]:
    found = []
    for page, text in PAGES.items():
        run_here = [block for block in blocks_of(text) if runs(page, block)]
        real = any(REAL_MODEL in block.code for block in run_here)
        for block in run_here:
            marks = {
                None: [],
                "slow": [pytest.mark.slow],
                "not run": [pytest.mark.skip(reason=f"{page}: {block.reason}")],
            }[block.mark]
            name = f"{page}:{block.line}"
            found.append(pytest.param(page, block, real, marks=marks, id=name))
            if real and block.mark is None:
                weights = pytest.mark.weights
                found.append(pytest.param(page, block, False, marks=weights, id=f"{name}-real"))
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages that are being run, each in a folder of its own."""
    return {
        (name, stood_in): Page(name, stood_in, tmp_path_factory.mktemp("page"))
        for name in PAGES
        for stood_in in (True, False)
    }


@pytest.fixture
def offline(monkeypatch):
    """Refuse to resolve names and to open connections."""

    def refuse(*_: object) -> None:
        raise OSError("the documentation is run without a network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(("page", "block", "stood_in"), cases())
def test_block(page, block, stood_in, pages, offline, monkeypatch):
    running = pages[page, stood_in]
    monkeypatch.chdir(running.folder)
    monkeypatch.setenv("COLUMNS", "100")
    printed = running.run_to(block.line)
    if block.shown is not None and not stood_in:
        assert agree(block.shown, printed), f"{page}, line {block.line}, prints\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text = PAGES[page]
    assert len(blocks_of(text)) == len(re.findall(r"```(?:python|bash)\b", text)), "unread block"
    scripts = [block.code for block in blocks_of(text) if block.language == "bash"]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`(lirefs [^`]+)`", prose)]
    usage_error = typer.BadParameter.__bases__[0]
    for script in [*scripts, *spans]:
        for arguments in commands_of(without_marks(script)):
            try:
                parse(arguments)
            except usage_error as problem:
                # A sentence or a synopsis may leave out required arguments.
                incomplete = re.match("Missing|NoArgsIsHelp|BadOptionUsage", type(problem).__name__)
                if not incomplete or (script in scripts and "[OPTIONS]" not in script):
                    raise


def test_blocks_are_read_with_their_marks_and_outputs():
    text = (
        "# A\n\n```python\nx = 1\n```\n\n```text\n1\n```\n\n```text\nno output\n```\n\n"
        "<!-- not run: too long -->\n```bash\nlirefs mine x\n```\n"
    )
    first, second = blocks_of(text)
    assert (first.code, first.shown, first.line, first.mark) == ("x = 1\n", "1\n", 3, None)
    assert (second.language, second.shown, second.mark) == ("bash", None, "not run")
    assert second.reason == "too long"
    assert agree("layer 2: 0.9 ...\n", "layer 2: 0.9 [0.8, 1.0]\n")
    assert not agree("layer 2: 0.9\n", "layer 2: 0.8\n")


def test_a_wrong_command_is_noticed():
    parse(["curvature", "collect", "--out", "x"])
    for wrong in (["compare", "--sweet"], ["curvature", "colect"], ["mine"], ["compare", "extra"]):
        with pytest.raises(typer.BadParameter.__bases__[0]):
            parse(wrong)
    script = "a=1 torchrun -n 2 $(which lirefs) compare \\\n --quick && .venv/bin/lirefs mine x # y"
    assert commands_of(script) == [["compare", "--quick"], ["mine", "x"]]


def test_the_site_builds_and_asks_the_network_for_nothing(tmp_path):
    needed = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
    if any(importlib.util.find_spec(name) is None for name in needed):
        pytest.skip("needs the docs extra: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"(https?:[^\"]*)",
            page.read_text(encoding="utf-8"),
        )
        assert not loaded, page
    assert "<math " in (tmp_path / "how-to" / "large-models.html").read_text(encoding="utf-8")
    for name in ("steer", "edit", "compare"):
        notebook = (tmp_path / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        assert f"examples/notebooks/{name}.ipynb" in notebook
    assert (tmp_path / "notebooks" / "steer-1.png").read_bytes().startswith(b"\x89PNG")


def test_links_lead_to_addresses_that_exist():
    linked = [
        one
        for file in ("pyproject.toml", "mkdocs.yml")
        for one in re.findall(r"https?://[^\s\"')]+", (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert set(linked) == {f"https://arxiv.org/abs/{one}" for one in ("2503.23084", "2510.24256")}


@pytest.mark.slow
def test_the_figure_of_the_readme_is_what_its_command_writes_today(tmp_path, monkeypatch):
    text = PAGES["README.md"]
    assert "![Retained performance by task group](docs/retained.png)" in text
    assert "`report/retained.png` of today's `lirefs compare`" in text
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lirefs", "compare"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    for name in ("retained.png", "retained-dark.png"):
        shown, written = (plt.imread(one) for one in (DOCS / name, f"report/{name}"))
        assert shown.shape == written.shape
        assert abs(shown - written).max() < 0.02, f"copy report/{name} to docs/{name}"
