"""A figure of a report."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from lirefs.pictures import Picture


@dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Attributes:
        name: File name without its extension.
        title: Heading.
        caption: What is shown, with n and the source of the intervals.
        picture: The figure itself.
    """

    name: str
    title: str
    caption: str
    picture: Picture

    @property
    def data_uri(self) -> str:
        """The picture as a `data:` address, so that a page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.picture.png).decode()

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of its files by extension, by which a page knows its own pictures."""
        files = {"png": self.picture.png, "svg": self.picture.svg}
        return {kind: hashlib.sha256(data).hexdigest() for kind, data in files.items()}
