"""Figures: from arrays to pictures, at most as wide as a page's text, with no text under 7 pt.

`data/figures.mplstyle` holds the style of all of them; `styled` draws under it.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from xml.parsers import expat

import numpy as np

from lirefs.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

P = ParamSpec("P")
R = TypeVar("R")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
"""The Okabe-Ito set, which colour-blind readers can distinguish, with grey for its yellow."""
WIDE = 7.0
"""Width in inches of a figure that spans both columns of a paper."""
SMALL = 7.0
"""Size in points of the smallest text."""
LONGEST = 100
"""Most characters of a line of text."""
STYLE = Path(__file__).parent / "data" / "figures.mplstyle"
"""The style of every figure, for `matplotlib.style.use` too."""
INK, PAPER = 0.9, 0.12
"""Grey levels of text and background in the dark variant of a figure."""


MOST_BYTES = 64 << 20
"""Bytes of a stranger's picture."""
_MOST_PIXELS = 100_000_000
_ELEMENTS = re.compile(
    "svg|g|defs|symbol|use|path|rect|circle|ellipse|line|polyline|polygon|text|tspan|image|title|desc|"
    "style|clipPath|mask|marker|pattern|linearGradient|radialGradient|stop|"
    "metadata|RDF|Work|Agent|creator|format|date|type"
)
"""Elements of an SVG picture that show something or say who made it, and do nothing else."""
_INSIDE = re.compile("#|data:image/(png|jpeg);")


@dataclass(frozen=True)
class Picture:
    """A figure in two formats: the same data give the same bytes."""

    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)

    @property
    def data_uri(self) -> str:
        """The PNG as a `data:` address, so that a page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    def save(self, folder: Path, name: str) -> None:
        """Write `name.png` and `name.svg`."""
        atomic_write_bytes(folder / f"{name}.png", self.png)
        atomic_write_bytes(folder / f"{name}.svg", self.svg)


def check_picture(picture: Picture) -> None:
    """Raise ValueError unless a stranger's picture is one, which runs and refers to nothing."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture.png), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                raise ValueError(f"its PNG has {width} x {height} pixels")
            image.verify()
    # IndexError: a file with no image data
    except (OSError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as problem:
        raise ValueError("not a PNG picture") from problem
    parser = expat.ParserCreate()
    parser.StartElementHandler = _check_element
    parser.CharacterDataHandler = _check_style
    parser.EntityDeclHandler = parser.ProcessingInstructionHandler = _refuse
    try:
        parser.Parse(picture.svg, True)
    except (expat.ExpatError, LookupError) as problem:
        raise ValueError(f"not an SVG picture ({problem})") from problem


def _check_element(name: str, attributes: Mapping[str, str]) -> None:
    if not _ELEMENTS.fullmatch(name.rpartition(":")[2]):
        raise ValueError(f"its SVG has an element <{name[:40]}>")
    for key, value in attributes.items():
        plain = key.rpartition(":")[2].lower()
        if plain.startswith("on") or (plain in ("href", "src") and not _INSIDE.match(value)):
            raise ValueError(f"its SVG has an attribute {key[:40]}={value!r:.40}")
        _check_style(value)


def _check_style(text: str) -> None:
    """Styles may name only what is inside the picture, and none are loaded."""
    if re.search(r"@import|url\(\s*(?![\s\"']*(#|data:image/(png|jpeg);))", text, re.IGNORECASE):
        raise ValueError(f"its SVG refers to something outside: {text.strip()!r:.40}")


def _refuse(*_: object) -> None:
    raise ValueError("its SVG declares entities or instructions")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw in this project's style, whatever settings the caller has made."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import style

        with style.context(STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return in_style


@styled
def canvas_of(
    panels: int, size: tuple[float, float], *, rows: int = 1, sharey: bool = False
) -> tuple[Canvas, Any]:
    """Make a figure of `rows` times `panels` axes without pyplot; `size` is in inches.

    A notebook shows it when it ends a cell.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    # Without pyplot, notebooks do not know by themselves how to show a figure.
    setattr(canvas, "_repr_png_", MethodType(_notebook_png, canvas))  # noqa: B010
    axes = np.atleast_1d(canvas.subplots(rows, panels, sharey=sharey)).ravel()
    for axis in axes:  # ticks are made when a figure is drawn, perhaps under another style
        axis.tick_params(which="both", labelsize=SMALL)
    return canvas, axes


@styled
def _notebook_png(canvas: Canvas) -> bytes:
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=144)
    return png.getvalue()


def integer_layer_ticks(*axes: Any) -> None:
    """Put ticks at whole numbers only, as layers are."""
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)


def legend_below(axis: Any, columns: int) -> None:
    """Put the legend under an axis and its label, where it covers no data."""
    from matplotlib.transforms import ScaledTranslation

    below = axis.transAxes + ScaledTranslation(0, -30 / 72, axis.figure.dpi_scale_trans)
    axis.legend(
        fontsize=SMALL,
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        borderaxespad=0,
        columnspacing=1.2,
        frameon=False,
    )


def literal_text(name: str) -> str:
    """A name to show as it is: without mathematics between dollar signs or control characters.

    Of a line of more than `LONGEST` characters the middle is left out.
    """
    lines = (shortened(one, LONGEST) if len(one) > LONGEST else one for one in name.split("\n"))
    shown = "".join(one if one.isprintable() or one == "\n" else " " for one in "\n".join(lines))
    return shown.replace("$", r"\$")


def shortened(name: str, most: int) -> str:
    """A name on one line of at most `most` characters, if need be with an ellipsis in its middle.

    The middle, because the names of a sweep begin alike.
    """
    name = " ".join(name.split())
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[-end:]}"


def legend_outside(canvas: Canvas, axis: Any, columns: int, side: str) -> None:
    """Put one panel's legend above (`upper`) or below (`lower`) all panels."""
    handles, names = axis.get_legend_handles_labels()
    place: Any = f"outside {side} center"
    canvas.legend(handles, names, fontsize=SMALL, ncols=columns, loc=place, frameon=False)


def colour_bar(canvas: Canvas, picture: Any, axes: Any, label: str) -> None:
    """Put a colour bar next to axes."""
    bar = canvas.colorbar(picture, ax=axes)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=SMALL)


@styled
def picture_of(canvas: Canvas, *, dark: bool = False) -> Picture:
    """Render as PNG (220 dpi) and SVG, with text as text and neither date nor random ids.

    The dark variant turns greys around and leaves colours as they are. The figure itself keeps it.
    """
    import matplotlib

    if dark:
        _darken(canvas)
    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lirefs"}):
        canvas.savefig(png, format="png", dpi=220)
        engine = canvas.get_layout_engine()
        canvas.set_layout_engine("none")  # the first call laid it out for both
        canvas.savefig(svg, format="svg", dpi=220, metadata={"Date": None})
        canvas.set_layout_engine(engine)
    return Picture(png.getvalue(), svg.getvalue())


def _darken(canvas: Canvas) -> None:
    """Turn all greys of a figure around, black to light and white to dark."""
    from matplotlib.collections import Collection
    from matplotlib.colors import to_rgba_array
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    attributes: dict[type, tuple[str, ...]] = {
        Text: ("color",),
        Line2D: ("color", "markerfacecolor", "markeredgecolor"),
        Patch: ("facecolor", "edgecolor"),
        Collection: ("facecolor", "edgecolor"),
    }
    for artist in canvas.findobj(lambda one: isinstance(one, tuple(attributes))):
        axis = artist.axes
        if axis is not None and axis.images and artist in axis.texts:
            continue  # text in a map of colours is legible there already
        kind = next(one for one in attributes if isinstance(artist, one))
        # All are read before one is set: edges may follow the colour of their line.
        tables = {
            name: to_rgba_array(getattr(artist, f"get_{name}")()) for name in attributes[kind]
        }
        for name, table in tables.items():
            grey = np.ptp(table[:, :3], axis=1) == 0
            table[grey, :3] = INK + (PAPER - INK) * table[grey, :3]
            if grey.any():
                getattr(artist, f"set_{name}")(table if kind is Collection else table[0])
    for axis in canvas.axes:  # ticks that are made later have the colour too
        axis.tick_params(which="both", color=str(INK), labelcolor=str(INK))
