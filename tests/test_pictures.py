import io

import matplotlib
import numpy as np
from matplotlib import pyplot
from PIL import Image

from lirefs import pictures
from lirefs.pictures import STYLE, canvas_of, literal_text, picture_of, styled


@styled
def drawn():
    canvas, (left, right) = canvas_of(2, (6, 3))
    left.plot([0, 1], [0, 1], color=pictures.COLOURS[0], label="line")
    left.plot([0, 1], [1, 0], "o-", color="black", mfc="white", label="hollow")
    left.axhline(0.5, color="black")
    left.legend()
    left.set_title(literal_text("a title of $x"))
    right.imshow(np.eye(2))
    right.text(0, 0, "in the map", color="black")
    return canvas


def pixels(picture):
    with Image.open(io.BytesIO(picture.png)) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def test_the_same_data_give_the_same_bytes_in_both_variants():
    assert picture_of(drawn()) == picture_of(drawn())
    dark = picture_of(drawn(), dark=True)
    assert dark == picture_of(drawn(), dark=True)
    assert dark.png != picture_of(drawn()).png


def test_settings_of_the_caller_do_not_reach_a_figure_nor_the_other_way():
    plain = picture_of(drawn())
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        inside = dict(matplotlib.rcParams)
        assert picture_of(drawn()) == plain
        assert dict(matplotlib.rcParams) == inside
    assert dict(matplotlib.rcParams) == before


def test_the_dark_variant_turns_greys_around_and_keeps_colours():
    light, dark = pixels(picture_of(drawn())), pixels(picture_of(drawn(), dark=True))
    blue = np.array([0x00, 0x72, 0xB2])
    for found in (light, dark):
        assert (found == blue).all(axis=1).sum() > 200
    assert np.median(light) == 255
    assert np.median(dark) < 0.2 * 255
    canvas = drawn()
    picture_of(canvas, dark=True)
    left, right = canvas.axes
    light_text = [left.title, left.xaxis.label, *left.get_xticklabels(),
                  *left.get_legend().get_texts()]  # fmt: skip
    assert {matplotlib.colors.to_hex(one.get_color()) for one in light_text} == {"#e6e6e6"}
    hollow = left.lines[1]
    assert matplotlib.colors.to_hex(hollow.get_markeredgecolor()) == "#e6e6e6"
    assert matplotlib.colors.to_hex(hollow.get_markerfacecolor()) == "#1f1f1f"
    assert matplotlib.colors.to_hex(right.texts[0].get_color()) == "#000000"  # it fits the map


def test_a_figure_can_be_restyled_and_is_shown_by_a_notebook_without_pyplot():
    canvas = drawn()
    shown = canvas._repr_png_()
    assert shown.startswith(b"\x89PNG")
    assert not pyplot.get_fignums()
    with matplotlib.rc_context({"font.size": 20, "xtick.labelsize": 20}):
        later = drawn()
        later.draw_without_rendering()
        assert {one.get_size() for one in later.axes[0].get_xticklabels()} == {pictures.SMALL}
    canvas.axes[0].set_title("another title")
    canvas.set_size_inches(4, 4)
    assert canvas._repr_png_() != shown
    assert "another title" in picture_of(canvas).svg.decode()
    assert canvas.get_layout_engine() is not None  # it can be laid out again


def test_the_style_can_be_used_by_its_file():
    with matplotlib.style.context(STYLE):
        assert matplotlib.rcParams["xtick.labelsize"] >= pictures.SMALL
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    assert [one.upper() for one in colours] == [one.upper() for one in pictures.COLOURS]
