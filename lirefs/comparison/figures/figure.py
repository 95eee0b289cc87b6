"""A figure of a report."""

from __future__ import annotations

import base64
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
