"""The page of a report in a real browser: no error, tables sort, filters work, it prints."""

import html
import json
import re

import pytest
from browser import BROWSER, browse, seen_in_frame
from made_up import NASTY, SHARED, made_up

from lirefs.comparison import Figure, flips
from lirefs.comparison.report.flip_list import MOST_FLIPS, flip_list
from lirefs.comparison.report.page import html_page as html_of
from lirefs.pictures import Picture

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")

DRIVER = """
const seen = { steps: {} };
const table = (place) => document.querySelectorAll("table")[place];
const column = (place, number) =>
  [...table(place).tBodies[0].rows].map((row) => row.cells[number].textContent.trim());
const press = (place, number) => table(place).querySelectorAll("button.sort")[number].click();
const order = (place) => [...table(place).tHead.rows[0].cells].map((one) => one.ariaSort);
const set = (name, value) => {
  const box = document.getElementById("flip-" + name);
  box.value = value;
  box.dispatchEvent(new Event("input", { bubbles: true }));
};
const flips = () => ({
  count: document.getElementById("flip-count").textContent,
  page: document.getElementById("flip-page").textContent,
  heads: [...document.querySelectorAll(".flip h4")].map((one) => one.textContent),
});
const copied = (button) => {
  let text = null;
  document.execCommand = () => { text = document.activeElement.value; return true; };
  button.click();
  return text;
};
Object.defineProperty(navigator, "clipboard", { value: undefined });

seen.before = column(0, 0);
press(0, 1); seen.rising = column(0, 1); seen.risingOrder = order(0);
press(0, 1); seen.falling = column(0, 1); seen.fallingOrder = order(0);
press(0, 0); seen.byName = column(0, 0); seen.nameOrder = order(0);
press(1, 4); seen.p = column(1, 4);
press(1, 4); seen.pFalling = column(1, 4);

seen.folded = [...document.querySelectorAll("details.section")].map((one) => one.open);
document.getElementById("flips").open = true;
seen.all = flips();
seen.first = document.querySelector(".flip").innerText;
document.querySelector(".flip details").open = true;
seen.shared = document.querySelector(".flip details p").textContent;
seen.marked = [...document.querySelectorAll(".flip del, .flip ins")].slice(0, 2)
  .map((one) => [one.tagName, one.textContent]);
seen.prompt = document.querySelector(".flip > p").textContent;
document.getElementById("flip-next").click(); seen.second = flips();
set("task", "1"); seen.task = flips();
set("variant", "0"); seen.variant = flips();
set("change", "0"); seen.lost = flips();
set("change", "1"); seen.gained = flips();
set("change", "");
set("text", "  ANSWER 7 "); seen.text = flips();
seen.flipsCopied = copied(document.querySelector("[data-copy=flips]"));
set("text", "no such words"); seen.none = flips();
document.getElementById("filters").reset();
seen.tableCopied = copied(table(0).querySelector(".copy"));
seen.settingsCopied = copied(document.querySelector("[data-copy=settings]"));
document.querySelector('nav a[href="#settings"]').click();
setTimeout(() => {
  seen.opened = document.getElementById("settings").open;
  seen.reset = flips();
  const box = document.createElement("pre");
  box.id = "seen";
  box.textContent = JSON.stringify(seen);
  document.body.append(box);
}, 50);
"""


@pytest.fixture(scope="module")
def comparison():
    return made_up(items=40)


@pytest.fixture(scope="module")
def text(comparison):
    figures = [Figure("one", "One", "A figure.", Picture(PNG, b"<svg/>"))]
    return html_of(comparison.summary(), flip_list(comparison), figures)


@pytest.fixture(scope="module")
def seen(text, tmp_path_factory):
    """What a script saw that pressed the headings and set the filters of the page."""
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    path.write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"), "utf-8")
    document, console = browse(
        path, folder, "--virtual-time-budget=5000", "--window-size=600,900", "--dump-dom"
    )
    assert console == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    assert found, document[-2000:]
    assert "<title>What 2 interventions change in made up</title>" in document
    return json.loads(html.unescape(found.group(1)))


def numbers(cells):
    return [float(one.split()[0]) for one in cells]


def test_tables_sort_by_value_and_say_so(seen):
    assert numbers(seen["rising"]) == sorted(numbers(seen["rising"]))
    assert numbers(seen["falling"]) == sorted(numbers(seen["rising"]), reverse=True)
    others = [None] * (len(seen["risingOrder"]) - 2)
    assert seen["risingOrder"] == [None, "ascending", *others]
    assert seen["fallingOrder"] == [None, "descending", *others]
    assert seen["nameOrder"] == ["ascending", None, *others]
    assert seen["byName"] == sorted(seen["before"])
    # No value comes last, whichever way the table is sorted.
    assert seen["p"] == ["< 0.001 *", "0.800", "-"]
    assert seen["pFalling"] == ["0.800", "< 0.001 *", "-"]


def test_filters_show_what_they_say(seen, comparison):
    def count(task=None, variant=None, gained=None, words=""):
        return sum(
            words in "\n".join((one.id, one.prompt, one.expected, one.before, one.after))
            and (gained is None or one.gained == gained)
            for t in comparison.tasks
            for v in comparison.variants[1:]
            if task in (None, t) and variant in (None, v)
            for one in flips(comparison, t, v)
        )

    total, (first, task, *_) = count(), comparison.tasks
    assert seen["all"]["count"] == f"{total} of {total} items"
    assert len(seen["all"]["heads"]) == 25
    assert seen["second"]["page"].startswith("page 2 of")
    assert seen["second"]["heads"][0] != seen["all"]["heads"][0]
    chosen = {
        "task": {"task": task},
        "variant": {"task": task, "variant": "variant A"},
        "lost": {"task": task, "variant": "variant A", "gained": False},
        "gained": {"task": task, "variant": "variant A", "gained": True},
        "text": {"task": task, "variant": "variant A", "words": "answer 7"},
        "none": {"words": "no such words"},
    }
    for step, settings in chosen.items():
        expected = count(**settings)
        assert seen[step]["count"] == f"{expected} of {total} items", step
        assert len(seen[step]["heads"]) == min(25, expected)
    assert all(one.startswith("lost") for one in seen["lost"]["heads"])
    assert all("variant A" in one for one in seen["lost"]["heads"])
    assert all(one.startswith("gained") for one in seen["gained"]["heads"])
    assert seen["reset"] == seen["all"]
    assert first in seen["all"]["heads"][0]


def test_an_item_shows_what_was_asked_and_both_answers(seen, comparison):
    one = flips(comparison, next(iter(comparison.tasks)), "variant A")[0]
    assert seen["shared"] == SHARED
    assert SHARED + seen["prompt"] == one.prompt
    assert seen["prompt"].endswith(NASTY)
    for words in (one.expected, one.before, one.after, "unchanged", "variant A"):
        assert words in seen["first"]


def test_text_is_copied_without_a_clipboard(seen, text, comparison):
    lines = [line.split("\t") for line in seen["tableCopied"].split("\n")]
    assert len(lines) == 1 + len(comparison.variants)
    assert {len(line) for line in lines} == {1 + len(comparison.summary().groups)}
    assert lines[0][1] == "memorization (n = 40)"
    assert json.loads(seen["settingsCopied"]) == comparison.summary().settings
    rows = [line.split("\t") for line in seen["flipsCopied"].split("\n")]
    assert {len(row) for row in rows} == {8}
    assert len(rows) - 1 == int(seen["text"]["count"].split()[0])


def test_what_is_folded_opens_from_the_menu(seen):
    assert seen["folded"]
    assert not any(seen["folded"])
    assert seen["opened"]


def test_a_flipped_item_marks_the_words_that_differ(seen, comparison):
    one = flips(comparison, next(iter(comparison.tasks)), "variant A")[0]
    before, after = one.before.split()[0], one.after.split()[0]
    assert seen["marked"] == [["DEL", before], ["INS", after]]


LOOK = """
const style = (selector) => getComputedStyle(document.querySelector(selector));
const box = (selector) => document.querySelector(selector).getBoundingClientRect();
for (const one of document.querySelectorAll("details.section")) one.open = true;
document.querySelector(".overview tbody tr").classList.add("control");
const light = (colour) =>
  colour.match(/[0-9]+/g).slice(0, 3).map(Number).reduce((one, other) => one + other) / 765;
setTimeout(() => parent.postMessage(JSON.stringify({
  inside: document.documentElement.scrollWidth <= window.innerWidth,
  paper: light(style("body").backgroundColor),
  inks: ["h1", ".note", "tr.control td", "nav a", ".flip p", ".badge"]
    .map((one) => light(style(one).color)),
  badge: light(style(".badge").backgroundColor),
  menuBeside: box("nav").right <= box("main").left,
  sticky: [style(".overview thead th").position, style(".overview tbody th").position],
  pictureFits: box("img").right <= window.innerWidth,
  enlarged: (document.querySelector(".plot").focus(), box("img").width),
  hints: [...document.querySelectorAll(".scroll")]
    .filter((one) => (one.scrollWidth > one.clientWidth + 1) !== one.matches(".wide")).length,
  copy: Math.max(...[...document.querySelectorAll("caption .copy")]
    .map((one) => one.getBoundingClientRect().right)) <= window.innerWidth,
  smallest: Math.min(...[...document.querySelectorAll("main *")]
    .filter((one) => one.innerText).map((one) => parseFloat(getComputedStyle(one).fontSize))),
  first: box(".verdict").top,
}), "*"), 100);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_is_legible_at_any_width_in_both_schemes(text, tmp_path, width, scheme):
    look = seen_in_frame(text, LOOK, tmp_path, width, scheme)
    assert look["inside"]
    assert (look["paper"] < 0.2) == (scheme == "dark")
    *inks, badge = look["inks"]
    for ink, paper in [*((one, look["paper"]) for one in inks), (badge, look["badge"])]:
        assert abs(ink - paper) > 0.35, look
    assert look["menuBeside"] == (width == 1400)
    assert look["sticky"] == ["sticky", "sticky"]
    assert look["pictureFits"]
    assert look["enlarged"] >= 640
    assert look["hints"] == 0
    assert look["copy"]
    assert look["smallest"] >= 10.5
    assert look["first"] < 350


def test_it_prints(text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    _, console = browse(path, tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert console == []
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) < 20


def test_ten_thousand_flips_are_bounded(tmp_path):
    many = made_up(tasks=6, variants=6, items=700)
    total = sum(len(flips(many, t, v)) for t in many.tasks for v in many.variants[1:])
    assert total > 8000
    text = html_of(many.summary(), flip_list(many), [])
    assert len(text) < 10_000_000
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    document, console = browse(path, tmp_path, "--dump-dom")
    assert console == []
    shown = int(re.search(r"([\d,]+) of [\d,]+ items", document).group(1).replace(",", ""))
    assert MOST_FLIPS * 0.99 < shown <= MOST_FLIPS
    assert f"{total - shown:,} are left out" in document
