"""Pages in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0"),
]


def browse(path: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """What the browser says of a page: its document, and lines of its console."""
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.split("\n") if "CONSOLE" in line]


FRAME = """<body style="margin:0"><script>
addEventListener("message", (event) => {
  const box = document.createElement("pre");
  box.id = "seen";
  box.textContent = event.data;
  document.body.append(box);
});
</script><iframe src="look.html" style="border:0;width:%dpx;height:1000px"></iframe></body>"""


def seen_in_frame(text: str, script: str, folder: Path, width: int, scheme: str) -> Any:
    """What a script posts to its parent from a page of some width, in a colour scheme."""
    (folder / "look.html").write_text(
        text.replace("</body>", f"<script>{script}</script></body>"), "utf-8"
    )
    frame = folder / "frame.html"
    frame.write_text(FRAME % width, "utf-8")
    document, console = browse(
        frame,
        folder,
        "--virtual-time-budget=5000",
        "--window-size=1500,1000",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        "--dump-dom",
    )
    assert console == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    return json.loads(html.unescape(found.group(1)))
