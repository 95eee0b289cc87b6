"""A figure of a report."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lirefs.pictures import Picture


@dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Attributes:
        name: File name without its extension.
        title: Heading.
        caption: What is shown, with n and the source of the intervals.
        picture: The figure itself.
        dark: Its variant for dark pages; None where there is none.
    """

    name: str
    title: str
    caption: str
    picture: Picture
    dark: Picture | None = None

    def save(self, folder: Path) -> None:
        """Write `name.png` and `name.svg`, and `name-dark` of both if there is such a variant."""
        self.picture.save(folder, self.name)
        if self.dark is not None:
            self.dark.save(folder, f"{self.name}-dark")

    @property
    def files(self) -> list[str]:
        """The names of the files that `save` writes."""
        names = [self.name] if self.dark is None else [self.name, f"{self.name}-dark"]
        return [f"{name}.{kind}" for name in names for kind in ("png", "svg")]

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of its files by extension, by which a page knows its own pictures."""
        files = {"png": self.picture.png, "svg": self.picture.svg}
        return {kind: hashlib.sha256(data).hexdigest() for kind, data in files.items()}
