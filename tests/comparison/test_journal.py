import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from journal_runs import hooks, tasks, variants
from tiny import tiny_model, tiny_tokenizer

from lirefs import Direction, MultipleChoice, ShortAnswer, Steer, compare, wrap
from lirefs.comparison import journal, load_comparison, write_report
from lirefs.comparison.results_file import results_json
from lirefs.errors import ResultsFileError, SettingError
from lirefs.tasks.task import ItemTask


@dataclass(frozen=True)
class Dying(ItemTask):
    """Raises when the countdown of parts reaches 0."""

    inner: MultipleChoice | ShortAnswer
    countdown: list[int]
    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.0

    def __repr__(self):
        return "Dying"

    def run(self, lm, advance):
        self.countdown[0] -= 1
        if self.countdown[0] < 0:
            raise KeyboardInterrupt
        rows = [int(item[0]) for item in self.items]
        return self.inner.subset(rows).run(lm, advance)


def test_an_interrupted_comparison_goes_on_with_the_same_result(lm, tmp_path, small_parts):
    countdown = [10**6]
    wrapped = [
        # The countdown is not a setting of the task: its repr must not tell two runs apart.
        Dying(one.name, one.items, one, Constant(countdown))
        for one in tasks()
    ]
    whole = results_json(compare(lm, variants(), wrapped, progress=False))
    runs, before = 0, hooks(lm)
    while True:
        countdown[0] = 2
        runs += 1
        try:
            found = compare(lm, variants(), wrapped, journal=tmp_path / "j", progress=False)
            break
        except KeyboardInterrupt:
            assert hooks(lm) == before  # the interrupted intervention is off again
    assert runs == 11  # 3 variants of 4 + 3 parts, two at a time
    assert results_json(found) == whole


class Constant(list):
    """A list that is shared, and shows nothing of what it holds."""

    def __init__(self, shared):
        self.shared = shared

    def __getitem__(self, index):
        return self.shared[index]

    def __setitem__(self, index, value):
        self.shared[index] = value

    def __repr__(self):
        return "countdown"


def test_lines_cut_short_or_foreign_are_run_again(lm, tmp_path, small_parts):
    whole = results_json(compare(lm, variants(), tasks(), progress=False))
    compare(lm, variants(), tasks(), journal=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    for text in (data[: len(data) // 2], data[:1], b"\xff\x00{}\n[]\n" + data[:-40], b""):
        file.write_bytes(text)
        again = compare(lm, variants(), tasks(), journal=tmp_path, progress=False)
        assert results_json(again) == whole


def test_the_key_tells_model_task_and_intervention_apart(lm):
    task = tasks()[0]
    other = MultipleChoice("choose", [*task.items[:-1], ("29", "other", [" a", " b"], 0)])
    longer = ShortAnswer("answer", tasks()[1].items, max_new_tokens=9)
    made = [("me", tasks()[0]), ("me", other), ("me", tasks()[1]), ("me", longer), ("you", task)]
    digests = [journal.task_digest(identity, lm, one) for identity, one in made]
    assert journal.task_digest("me", lm, task) == digests[0]
    assert len(set(digests)) == len(made)
    one = Direction(torch.ones(32), 1)
    first, second = (Steer(one.random_like(seed), "add").describe() for seed in (0, 1))
    assert first["directions"][0]["norm"] == pytest.approx(second["directions"][0]["norm"])
    assert journal.part_key("d", "v", first) != journal.part_key("d", "v", second)


def test_parts_hold_every_row_once_and_like_lengths_together(small_parts):
    rows = journal.task_parts(tasks()[0])
    assert sorted(row for part in rows for row in part) == list(range(30))
    lengths = [[len(repr(tasks()[0].items[row])) for row in part] for part in rows]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(lengths))


def test_a_journal_that_is_a_file_is_refused(lm, tmp_path):
    (tmp_path / "j").write_text("")
    with pytest.raises(SettingError, match="not a folder"):
        compare(lm, {}, tasks(), journal=tmp_path / "j", progress=False)


def test_results_come_back_from_their_file(lm, tmp_path):
    found = compare(lm, variants(), tasks(), progress=False)
    write_report(found, tmp_path)
    again = load_comparison(tmp_path)
    assert again.results == found.results
    assert results_json(again) == results_json(found)


def test_a_damaged_part_runs_again(lm, tmp_path, small_parts):
    whole = compare(lm, variants(), tasks(), journal=tmp_path / "j", progress=False)
    (file,) = (tmp_path / "j").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines() if line]
    del rows[0]["items"][0]
    rows[1]["items"][0]["scores"] = {"other": 1.0}
    rows[2]["items"][0]["scores"] = {"accuracy": "1"}
    rows[3]["items"][0]["weight"] = 0
    rows[4]["items"][0]["id"] = None
    rows[5]["items"][0]["scores"]["more"] = 1.0
    lines = [*map(json.dumps, rows), "[" * 100_000]
    file.write_text("\n".join(lines))
    again = compare(lm, variants(), tasks(), journal=tmp_path / "j", progress=False)
    assert again.results == whole.results
    kept = [line for line in file.read_text().splitlines() if line]
    assert len(kept) == len(lines) + 6


def test_damaged_results_are_named(lm, tmp_path):
    write_report(compare(lm, variants(), tasks(), progress=False), tmp_path, figures=())
    file = tmp_path / "results.json"
    text = file.read_text()
    with pytest.raises(ResultsFileError, match="cannot be read"):
        load_comparison(tmp_path / "nowhere")
    data = json.loads(text)
    broken = {
        "not the JSON": text[: len(text) // 2],
        "format 'x'": json.dumps({**data, "format": "x"}),
        "format None": "[]",
        "damaged": json.dumps({**data, "results": {"unchanged": {}}}),
    }
    del data["results"]["strong"]["choose"][3]
    broken["damaged .*shorter"] = json.dumps(data)
    for message, content in broken.items():
        file.write_text(content)
        with pytest.raises(ResultsFileError, match=message):
            load_comparison(tmp_path)


SUPPORT = Path(__file__).parents[1] / "support"

SCRIPT = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from journal_runs import tasks, variants
from tiny import tiny_model, tiny_tokenizer
import lirefs
from lirefs.comparison import journal
from lirefs.comparison.results_file import results_json
torch.set_num_threads(1)
journal.PART = 4
if {distributed}:
    dist.init_process_group("gloo")
lm = lirefs.wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
told = []
found = lirefs.compare(
    lm, variants(), tasks(), journal=sys.argv[1], progress=False, callback=told.append
)
rank = dist.get_rank() if {distributed} else 0
open(sys.argv[2] + str(rank), "w").write(results_json(found))
open(sys.argv[2] + "-told" + str(rank), "w").write(str(len(told)))
"""


def script(tmp_path, distributed):
    file = tmp_path / f"run_{distributed}.py"
    file.write_text(SCRIPT.format(tests=str(SUPPORT), distributed=distributed))
    return file


def test_two_processes_give_the_same_items_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PART", 4)
    lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    alone = results_json(compare(lm, variants(), tasks(), progress=False))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [script(tmp_path, True), tmp_path / "two", tmp_path / "shared"]
    subprocess.run([*torchrun, *arguments], check=True, timeout=240)
    assert (tmp_path / "shared0").read_text() == alone
    assert (tmp_path / "shared1").read_text() == alone
    told = [int((tmp_path / f"shared-told{rank}").read_text()) for rank in (0, 1)]
    assert told == [len(json.loads(alone)["cells"]), 0]
    # Both did a part of the work.
    sizes = [len(file.read_text().split()) for file in sorted((tmp_path / "two").iterdir())]
    assert len(sizes) == 2
    assert min(sizes) > 0


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(tmp_path):
    """Kills with SIGKILL, at moments spread over the run; about a minute."""
    file, folder = script(tmp_path, False), tmp_path / "journal"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    whole = [sys.executable, file, tmp_path / "never", tmp_path / "whole"]
    subprocess.run(whole, check=True, env=environment, timeout=240)
    seconds = time.monotonic() - start
    for attempt in range(10):
        command = [sys.executable, file, folder, tmp_path / "again"]
        process = subprocess.Popen(command, env=environment)
        time.sleep(seconds * (0.5 + 0.05 * attempt))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, env=environment, timeout=240)
    assert (tmp_path / "again0").read_text() == (tmp_path / "whole0").read_text()
