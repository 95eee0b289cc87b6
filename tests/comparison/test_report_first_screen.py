"""What a report says first: verdict, methods and controls, title, notes, run and figures."""

import json
import re
import sys
from dataclasses import replace

import pytest
from command_line import run
from journal_runs import tasks, variants
from made_up import drawn, made_up
from tiny import tiny_model, tiny_tokenizer

from lirefs import compare, wrap
from lirefs.comparison import Comparison, Figure, TaskInfo, load_comparison, write_report
from lirefs.comparison.compare import command_line
from lirefs.comparison.controls import is_control
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.report import page, tables, write
from lirefs.comparison.report.flip_list import flip_list
from lirefs.comparison.report.verdict import verdict
from lirefs.comparison.report.words_diff import AFTER, BEFORE, SAME, words_diff
from lirefs.comparison.results_file import results_json
from lirefs.comparison.wording import as_duration, as_list_of_words, as_percent
from lirefs.errors import ResultsFileError, SettingError
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import ItemResult


def scored(shares, groups):
    """A comparison of 100 items a task; shares of right answers by variant and task."""
    results = {
        variant: {
            task: [ItemResult(str(i), {"accuracy": float(i < 100 * share)}) for i in range(100)]
            for task, share in zip(groups, row)
        }
        for variant, row in shares.items()
    }
    infos = {task: TaskInfo(group, "accuracy") for task, group in groups.items()}
    return Comparison(results, infos, resamples=50)


GROUPS = {"verses": "memorization", "sums": "arithmetic", "logic": "reasoning"}


def test_the_verdict_is_over_all_methods_tasks_and_controls():
    shares = {
        "unchanged": (1.0, 0.9, 0.8),
        "harsh": (0.1, 0.3, 0.8),
        "gentle": (0.1, 0.9, 0.6),
        "weak": (0.9, 0.9, 0.8),
        "random direction": (0.5, 0.9, 0.8),
        "SVD": (1.0, 0.1, 0.1),
    }
    found = verdict(scored(shares, GROUPS).summary())
    assert len(found) == 3
    assert found[0].startswith("gentle and harsh lower memorization to 10\u00a0%\u00a0[")
    assert found[1].startswith(
        "What gentle keeps least of the 2 other tasks is logic, 75\u00a0%\u00a0["
    )
    assert found[1].endswith("; of all methods, harsh costs most, in sums.")
    assert "not a clear" not in found[1]
    assert found[2].startswith(
        "Of the controls, random direction lowers memorization to 50\u00a0%\u00a0["
    )
    assert found[2].endswith("].")
    assert all(len(re.findall(r"\d+\u00a0%\u00a0\[\d+, ?\u00a0?\d+\]", one)) == 1 for one in found)


def test_the_verdict_says_where_a_control_does_the_same():
    shares = {"unchanged": (1.0, 0.9, 0.8), "m": (0.1, 0.9, 0.8), "SVD": (0.1, 0.5, 0.8)}
    assert verdict(scored(shares, GROUPS).summary())[2].endswith(
        ", so what tells a method from them is how much else it keeps."
    )


def test_the_verdict_claims_no_change_that_is_not_clear():
    shares = {"unchanged": (1.0, 0.9, 0.8), "m": (0.99, 0.89, 0.8), "SVD": (1.0, 0.9, 0.8)}
    first, second, third = verdict(scored(shares, GROUPS).summary())
    assert first.startswith("No method clearly lowers memorization: m, the lowest, at 99")
    assert second.endswith("not a clear change.")
    assert third.startswith("No control clearly lowers memorization: SVD")


def test_the_verdict_without_recitation_or_controls():
    groups = {"harm": "safety", "sums": "arithmetic"}
    shares = {"unchanged": (0.4, 0.9), "m": (0.8, 0.5), "n": (0.5, 0.9)}
    least, most, control = verdict(scored(shares, groups).summary())
    assert least.startswith("Of the 2 tasks, sums is retained least, under m: 56")
    assert most.startswith("m raises harm most, to 200")
    assert control.startswith("No control was run")
    nothing = verdict(scored({"unchanged": (0.0, 0.0), "m": (0.0, 0.0)}, groups).summary())
    assert nothing == [
        "The unchanged model is above chance on no task, so there is nothing to retain."
    ]
    assert verdict(scored({"unchanged": (0.4, 0.9)}, groups).summary()) == []


@pytest.mark.parametrize(
    ("name", "described", "expected"),
    [
        ("random direction + K-FAC", None, True),
        ("low rank", {"kind": "svd"}, True),
        ("mixed", {"kind": "both", "members": [{"kind": "x"}, {"kind": "random_pairs"}]}, True),
        ("my control", {"kind": "steer"}, True),
        ("K-FAC", {"kind": "kfac"}, False),
        ("randomness", {"kind": "steer", "members": 3}, False),
        ("controlled", "no mapping", False),
    ],
)  # fmt: skip
def test_names_and_kinds_say_what_is_a_control(name, described, expected):
    assert is_control(name, described) == expected


def test_tables_have_methods_above_and_controls_in_grey():
    shares = {"unchanged": (1.0, 0.9, 0.8), "SVD": (0.5,) * 3, "m": (0.123, 0.9, 0.8)}
    summary = scored(shares, GROUPS).summary()
    for table in (tables.overview_table(summary), tables.task_table(summary, "sums")):
        assert [row[0].text for row in table.rows] == ["unchanged", "m", "SVD"]
        assert table.grey == {2}
    assert tables.overview_table(summary).rows[1][1].text == "13\u00a0%"
    text = page.html_page(summary, flip_list(scored(shares, GROUPS)), [])
    assert re.search(r"<dt>Methods</dt><dd>m</dd>.*<dt>Controls</dt><dd>SVD</dd>", text, re.DOTALL)
    assert re.search(r'<tr class="(clear )?control">\s*<th scope="row">SVD</th>', text)


def test_the_page_names_the_controls_that_are_here_and_what_each_does():
    shares = {"unchanged": (1.0,) * 3, "SVD": (0.5,) * 3, "my control": (1.0,) * 3}
    shares["random direction + m"] = shares["m"] = (0.5,) * 3
    found = scored(shares, GROUPS)
    text = page.html_page(found.summary(), flip_list(found), [])
    assert "SVD (the same matrices cut to fewer singular values" in text
    assert "; my control; random direction + m (a push" in text
    assert "together with m)" in text
    assert "random pairs" not in text


def test_the_first_screen_says_what_guessing_would_retain():
    groups = {"verses": "memorization", "logic": "reasoning"}
    found = scored({"unchanged": (1.0, 0.8), "m": (0.1, 0.8)}, groups)
    assert "chance" not in tables.overview_table(found.summary()).note
    found.tasks["logic"] = TaskInfo("reasoning", "accuracy", 0.4)
    note = tables.overview_table(found.summary()).note
    assert note.endswith("guessing would retain 50 % of reasoning.")


def test_findings_stand_under_their_questions_and_words_are_explained():
    asked = ["1. Is it so?", "It is so. Numbers: 5 % [3, 9]. LiReF ablate."]
    found = replace(made_up(), provenance={"model_name": "x", "findings": asked})
    summary = found.summary()
    text = page.html_page(summary, flip_list(found), [])
    assert "<h3>1. Is it so?</h3>" in text
    assert (
        "<p><strong>It is so.</strong> Numbers: 5\u00a0%\u00a0[3,\u00a09]. LiReF ablate.</p>"
        in text
    )
    assert "<dt>ablate</dt>" in text
    assert "<dt>amplify</dt>" not in text
    plain = write.markdown_report(summary, [])
    assert "\n### 1. Is it so?\n" in plain
    assert "* **ablate**: steering" in plain


def test_tables_round_as_sentences_do_and_keep_what_they_sort_by():
    shares = {"unchanged": (1.0, 0.92, 0.8), "m": (0.5, 0.87, 0.8)}
    table = tables.task_table(scored(shares, GROUPS).summary(), "sums")
    row = dict(zip(table.head, table.rows[1]))
    assert row["accuracy [95 %]"].text == "87\u00a0%"
    assert row["accuracy [95 %]"].value == 0.87
    assert row["retained [95 %]"].text == "95\u00a0%"  # 94.57
    assert row["difference, points [95 %]"].text == "-5"
    assert str(row["difference, points [95 %]"].interval).startswith("[-")
    texts = tables.task_table(made_up().summary(), "texts")
    assert re.fullmatch(r"\d\.\d{3}|\d\d\.\d\d", texts.rows[0][1].text)
    assert [tables._digits(one) for one in (1.5557, 24.712, 0.5, 12345.6)] == [
        "1.556", "24.71", "0.500", "12,346",
    ]  # fmt: skip


def test_arrows_are_explained_only_where_there_are_arrows():
    plain = {"unchanged": (0.9, 0.9, 0.8), "m": (0.5, 0.9, 0.8)}
    far = {"unchanged": (0.9, 0.3, 0.8), "m": (0.5, 0.9, 0.8)}
    for shares, expected in ((plain, False), (far, True)):
        for one in retained_figures(scored(shares, GROUPS).summary()):
            assert ("Arrows" in one.caption) == expected


def test_numbers_as_sentences_say_them():
    assert as_percent(Estimate(0.8123, 0.71, 0.888, 9)) == "81 % [71, 89]"
    assert as_percent(Estimate(0.003, 0.0026, 0.0034, 9)) == "0.3 % [0.26, 0.34]"
    assert as_percent(Estimate(0.003, 0.0, float("inf"), 9)) == "0.3 % [0, inf]"
    assert [as_duration(one) for one in (0.4, 59.7, 185, 7300)] == [
        "0 s", "1 min 0 s", "3 min 5 s", "2 h 1 min",
    ]  # fmt: skip
    assert as_list_of_words(["a"]) == "a"
    assert as_list_of_words(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("the cat sat", "the dog sat"), ("", "a b"), ("same", "same"), ("a  b\n", "a b"),
        ("x " * 400, "y"), (" lead", "lead "), ("\u2028a\x1cb", "a\u2028b"),
    ],
)  # fmt: skip
def test_words_diff_joins_to_both_texts(before, after):
    parts = words_diff(before, after)
    assert "".join(text for kind, text in parts if kind != AFTER) == before
    assert "".join(text for kind, text in parts if kind != BEFORE) == after
    assert all(text for _, text in parts) or not before


def test_words_diff_marks_only_what_differs():
    assert words_diff("the cat sat", "the dog sat") == [
        (SAME, "the"), (BEFORE, " cat"), (AFTER, " dog"), (SAME, " sat"),
    ]  # fmt: skip


def test_title_notes_and_run_stand_on_the_page_and_come_back(tmp_path):
    timed = {"started": "2026-11-30T01:02:03+00:00", "seconds": 185.2, "command": "lirefs compare"}
    found = replace(made_up(), title="Mine & yours", notes=("First.", "Second."), run=timed)
    path = write_report(found, tmp_path, [])
    text = path.read_text()
    for words in (
        "<h1>Mine &amp; yours</h1>", "<p>First.</p>", "<p>Second.</p>",
        "<strong>2026-11-30 01:02</strong>",
        "<code>lirefs compare</code>", "<strong>3 min 5 s</strong>", "<strong>made up</strong>",
    ):  # fmt: skip
        assert words in text, words
    again = load_comparison(tmp_path)
    assert (again.title, again.notes, again.run) == (found.title, found.notes, timed)
    assert "Mine & yours" in (tmp_path / "report.md").read_text()
    for key, wrong in {
        "title": 1, "notes": "one", "run": {"seconds": "long"}, "seconds": None,
    }.items():  # fmt: skip
        data = json.loads((tmp_path / "results.json").read_text())
        data.update({"run": {"seconds": -1}} if key == "seconds" else {key: wrong})
        other = tmp_path / "other.json"
        other.write_text(json.dumps(data))
        with pytest.raises(ResultsFileError, match="damaged"):
            load_comparison(other)


@pytest.fixture
def saved(tmp_path):
    own = Figure("own", "Own", "A figure.", drawn())
    write_report(made_up(tasks=2, variants=2, items=4), tmp_path, [own])
    return tmp_path


def test_a_picture_of_another_command_is_not_shown_and_the_page_says_so(saved, monkeypatch, capsys):
    assert run(monkeypatch, "report", saved) == 0
    assert "A figure." in (saved / "report.html").read_text()
    (saved / "own.png").write_bytes(drawn(1).png)
    assert run(monkeypatch, "report", saved) == 0
    text = (saved / "report.html").read_text()
    assert "A figure." not in text
    reason = "own.png is not the picture of this comparison (its SHA-256 differs)"
    assert f"Not shown: {reason}." in text
    assert reason in (saved / "report.md").read_text()
    assert reason in " ".join(capsys.readouterr().err.split())


def test_reports_without_digests_title_and_run_load_and_render(saved, tmp_path):
    data = json.loads((saved / "results.json").read_text())
    for one in data["figures"]:
        assert set(one.pop("sha256")) == {"png", "svg"}
    for key in ("title", "notes", "run"):
        data.pop(key, None)
    (saved / "results.json").write_text(json.dumps(data))
    comparison = load_comparison(saved)
    figures, left_out = write.load_report_figures(saved, comparison.summary())
    assert ([one.name for one in figures], left_out) == (["own"], [])
    text = write.write_pages(comparison, tmp_path / "new", figures).read_text()
    assert "What 2 interventions change in made up" in text
    assert "run time" not in text


def test_a_callback_gets_each_finished_cell(tmp_path):
    lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    some = {"resamples": 20, "progress": False}
    plain = compare(lm, variants(), tasks(), **some)
    for _ in range(2):  # then from the journal
        told = []
        found = compare(
            lm, variants(), tasks(), **some, journal=tmp_path / "j", callback=told.append,
            title="T", notes=["n"],
        )  # fmt: skip
        assert [(one.variant, one.task) for one in told] == [
            (variant, task) for variant in found.variants for task in found.tasks
        ]
        for one in told:
            assert one.p_holm is None
            assert one == replace(found.cell(one.variant, one.task), p_holm=None)
    assert (found.title, found.notes, found.run["resumed"]) == ("T", ("n",), True)
    assert results_json(replace(found, title="", notes=())) != results_json(found)
    assert found.cells() == plain.cells()
    assert set(plain.run) == {"started", "seconds", "command", "resumed"}
    assert "run" not in json.loads(results_json(plain))  # the same run gives the same text


def test_wrong_titles_notes_and_callbacks_are_refused():
    lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    for settings in ({"title": 1}, {"notes": "one"}, {"notes": [1]}, {"callback": "print"}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            compare(lm, {}, tasks(), **settings, progress=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/bin/lirefs", "compare", "--out", "a b"], "lirefs compare --out 'a b'"),
        (["/x/lirefs/__main__.py", "compare"], "lirefs compare"),
        (["/x/mine.py", "--token", "secret"], "mine.py"),
        ([], ""),
    ],
)
def test_only_commands_of_this_library_are_shown_whole(monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", arguments)
    assert command_line() == expected
