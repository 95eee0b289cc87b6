import json
from pathlib import Path

import pytest
from skill_rows import N, lettered_options, rows_of, write

from lirefs import MultipleChoice, Recitation, ShortAnswer
from lirefs.errors import TaskError
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.papers.catalogue import SKILLS, WORKED_EXAMPLES
from lirefs.tasks.task import GROUPS, FilledBlank

pytestmark = pytest.mark.usefixtures("asked_of_the_hub")
REAL = Path(__file__).parents[3] / "shared" / "data"


def test_every_skill_builds_from_its_documented_fields(lm, folder, asked_of_the_hub):
    tasks, left_out = skill_tasks(lm, folder)
    assert left_out == {}
    assert asked_of_the_hub == []
    assert [task.name.split(" ")[0] for task in tasks] == list(SKILLS)
    kinds = {
        "choice": MultipleChoice,
        "blank": FilledBlank,
        "text": ShortAnswer,
        "number": ShortAnswer,
        "worked": ShortAnswer,
        "words": ShortAnswer,
        "recitation": Recitation,
    }
    for task, skill in zip(tasks, SKILLS.values(), strict=True):
        assert task.group == skill.group
        assert task.group in GROUPS
        assert type(task) is kinds[skill.scoring]
        assert len({item[0] for item in task.items}) == len(task)
        assert task.items == skill_tasks(lm, folder, [skill.name])[0][0].items


def test_the_fields_of_the_table_are_enough():
    for name, skill in SKILLS.items():
        if skill.read:
            rows = [{field: row[field] for field in skill.fields} for row in rows_of(skill.file)]
            assert any(map(skill.read, rows)), name
        else:
            assert bool(skill.fields) == (skill.scoring == "recitation"), name


def test_chance(lm, folder):
    chances = {task.name.split(" ")[0]: task.chance for task in skill_tasks(lm, folder)[0]}
    expected = dict.fromkeys(chances, 0.0)
    expected |= {"boolq": 1 / 2, "winogrande": 1 / 2, "boolean_expressions": 1 / 2}
    expected |= {"web_of_lies": 1 / 2, "openbookqa": 1 / 4, "openbookqa_fact": 1 / 4}
    expected |= {"mmlu_memory": 1 / 4, "mmlu_reasoning": 1 / 4, "ceval_h": 1 / 4}
    expected |= {"mmlu_pro": 1 / 10, "mmlu_pro_math": 1 / 10}
    expected |= {"generated_booleans": 1 / 2, "generated_tracking": 1 / 4}
    expected |= {"generated_elimination": 1 / 3}
    for word, n in {"three": 3, "five": 5, "seven": 7}.items():
        for name in ("logical_deduction", "tracking_shuffled_objects"):
            expected[f"{name}_{word}_objects"] = 1 / n
    assert chances == pytest.approx(expected)


def test_examples_are_never_tested_and_all_other_rows_are(lm, folder):
    for name, skill in SKILLS.items():
        if not skill.shots:
            continue
        task = skill_tasks(lm, folder, [name])[0][0]
        rows = [one for one in map(skill.read, rows_of(skill.file)) if one is not None]
        tags = len({one.tag for one in rows}) if skill.shots_by_tag else 1
        assert len(task) == len(rows) - skill.shots * tags, name
        for item in task.items:
            prompt = item[1][0] if skill.scoring == "blank" else item[1]
            *shots, asked = prompt.split(skill.separator)
            assert len(shots) == skill.shots, name
            asked_prompts = {
                (one[1][0] if skill.scoring == "blank" else one[1]).split(skill.separator)[-1]
                for one in task.items
            }
            assert asked in asked_prompts
            for shot in shots:
                assert not any(shot.startswith(other) for other in asked_prompts), name


def test_duplicates_of_an_example_are_not_tested(lm, tmp_path):
    rows = rows_of("popqa")
    write(tmp_path, "popqa", rows * 2)
    task = skill_tasks(lm, tmp_path, ["popqa"])[0][0]
    assert len(task) == 2 * (N - SKILLS["popqa"].shots)
    shots = task.items[0][1].split("\n\n")[:-1]
    assert len(set(shots)) == SKILLS["popqa"].shots


def test_examples_show_no_option_more_often_than_its_share(lm, folder):
    for seed in range(5):
        tasks, _ = skill_tasks(lm, folder, ["boolean_expressions", "openbookqa"], seed=seed)
        booleans, letters_ = (task.items[0][1] for task in tasks)
        shown = [line.split()[-1] for line in booleans.split("\n")[:-1]]
        assert sorted(shown) == ["False", "False", "True", "True"]
        shown = [part[-1] for part in letters_.split("\n\n")[:-1]]
        assert len(shown) == 5
        assert max(map(shown.count, shown)) == 2


def test_examples_are_full_even_when_all_answers_are_the_same(lm, tmp_path):
    write(tmp_path, "boolq", [one | {"answer": True} for one in rows_of("boolq")])
    (task,), _ = skill_tasks(lm, tmp_path, ["boolq"])
    assert task.items[0][1].count("A: yes\n\n") == SKILLS["boolq"].shots


def test_long_rows_are_asked_but_never_examples(lm, tmp_path):
    rows = rows_of("boolq")
    for row in rows[:15]:
        row["passage"] = "long " * 300 + row["passage"]
    write(tmp_path, "boolq", rows)
    (task,), _ = skill_tasks(lm, tmp_path, ["boolq"])
    asked = [prompt.split("\n\n") for _, prompt, _, _ in task.items]
    assert sum("long" in parts[-1] for parts in asked) == 15
    assert not any("long" in shot for parts in asked for shot in parts[:-1])


def test_golden_prompts(lm, folder):
    def first(name, number, file=None):
        (task,), _ = skill_tasks(lm, folder, [name])
        found = [item for item in task.items if item[0].split("/")[-1] == str(number)]
        return found[0] if found else first(name, number + 2)

    item, prompt, answers = first("relations", 1)
    number = int(item.removeprefix("capital/")) - 1
    *shots, asked = prompt.split("\n")
    assert asked == f"The capital of place {number} is"
    assert answers == [f"Nam\u00e9 {number}".replace("\u00e9", "e\u00ed")]
    assert all(one.startswith("The capital of place ") for one in shots)
    assert all(" is Name\u00ed " in one for one in shots)

    item, prompt, answers = first("gsm8k", 3)
    assert prompt == f"{WORKED_EXAMPLES['word_problems']}Q: problem 2\nA:"
    assert (item, answers) == ("3", ["2,000"])

    item, prompt, answers = first("mgsm", 4)
    assert (item, answers) == ("te/4", ["3"])
    assert prompt == f"{WORKED_EXAMPLES['word_problems']}Q: p 3\nA:"

    item, prompt, options, right = first("openbookqa_fact", 1)
    i = int(item) - 1
    assert prompt.split("\n\n")[-1] == (
        f"Fact: fact {i}\nQuestion: lettered {i}\nA. option {i} 0\nB. option {i} 1\n"
        f"C. option {i} 2\nD. option {i} 3\nAnswer:"
    )
    assert (options, right) == ([" A", " B", " C", " D"], i % 4)

    item, prompt, options, right = first("ceval_h", 1)
    i = int(item.removeprefix("law/")) - 1
    assert prompt.split("\n\n")[-1].startswith(f"问题：lettered {i}\nA. option")  # noqa: RUF001
    assert prompt.endswith("D. option " + f"{i} 3\n答案：")  # noqa: RUF001
    assert (options, right) == (["A", "B", "C", "D"], i % 4)

    item, prompt, options, right = first("mmlu_pro", 2)
    assert item.startswith("computer_science/")
    assert options[-1] == " J"

    item, prompt, options, right = first("web_of_lies", 1)
    assert prompt.split("\n\n")[-1] == f"Q: Ann {int(item) - 1} lies?\nA:"
    assert options == [" Yes", " No"]

    item, prompt, options, right = first("logical_deduction_five_objects", 1)
    text, target = lettered_options(int(item) - 1, 5)
    assert prompt.endswith(f"\n\nQ: {text}\nA:")
    assert options == [" (A)", " (B)", " (C)", " (D)", " (E)"]
    assert options[right] == f" {target}"

    item, prompt, options, right = first("boolean_expressions", 1)
    assert prompt.split("\n")[-1] == f"not ( True ) {int(item) - 1} is"

    item, prompt, answers = first("triviaqa_open", 1)
    i = int(item) - 1
    asked = f"Passage: It is said that thing{i} is it.\nQ: what {i}?\nA:"
    assert prompt.split("\n\n")[-1] == asked
    assert "context" not in first("triviaqa", 1)[1]

    item, prompt, options, right = first("boolq", 1)
    i = int(item) - 1
    assert prompt.split("\n\n")[-1] == f"Passage: text {i}\nQ: is {i} so?\nA:"
    assert options[right] == (" yes" if i % 2 == 0 else " no")

    item, (one, two), ending, right = first("winogrande", 1)
    i = int(item) - 1
    assert one.split("\n\n")[-1] == f"Ann met Eve {i} and Ann"
    assert two.split("\n\n")[-1] == f"Ann met Eve {i} and Eve"
    assert (ending, right) == (" was glad.", i % 2)
    shots = one.split("\n\n")[:-1]
    assert shots == two.split("\n\n")[:-1]
    for shot in shots:
        number = int(shot.split()[3])
        assert shot == f"Ann met Eve {number} and {['Ann', 'Eve'][number % 2]} was glad."


def test_ids_go_by_relation_and_a_limit_takes_of_each_in_turn(lm, tmp_path):
    rows = rows_of("relations") + [
        {"relation": "ceo", "prompt": "{} is led by", "subject": f"x {i}", "object": "y"}
        for i in range(50)
    ]
    write(tmp_path, "relations", rows)
    (task,), _ = skill_tasks(lm, tmp_path, ["relations"], limit=8)
    tags = [item.split("/")[0] for item, *_ in task.items]
    assert sorted(tags) == ["capital"] * 4 + ["ceo"] * 4
    (more,), _ = skill_tasks(lm, tmp_path, ["relations"], limit=12)
    assert more.items[:8] == task.items
    (other,), _ = skill_tasks(lm, tmp_path, ["relations"], limit=8, seed=1)
    assert other.items != task.items


def test_labels_split_the_mmlu_rows(lm, folder):
    (memory,), _ = skill_tasks(lm, folder, ["mmlu_memory"])
    (reasoning,), _ = skill_tasks(lm, folder, ["mmlu_reasoning"])
    assert {int(item) % 2 for item, *_ in memory.items} == {1}  # the first row is memory
    assert {int(item) % 2 for item, *_ in reasoning.items} == {0}


def test_windows_go_by_ids_only_where_these_are_of_the_tokenizer(lm, tmp_path):
    ids = lm.encode(["a window that is recited"], add_special_tokens=False)[0]
    row = {
        "prefix_ids": ids[:12],
        "suffix_ids": ids[12:],
        "prefix_text": lm.tokenizer.decode(ids[:12]),
        "suffix_text": lm.tokenizer.decode(ids[12:]),
    }
    foreign = row | {"prefix_ids": [99_999, *ids[1:12]]}
    wrong = row | {"prefix_ids": ids[:12][::-1]}
    stamped = row | {"tokenizer": "another"}
    strange = row | {"prefix_ids": ["a", None]}
    negative = row | {"prefix_ids": [-1]}
    for other in (foreign, wrong, stamped, strange, negative):
        write(tmp_path, "memorized_windows*", [other])
        (task,), _ = skill_tasks(lm, tmp_path, ["memorized_windows"])
        assert task.name == "memorized_windows (texts)"
        assert lm.tokenizer.decode(task.items[0][2]).strip() == row["suffix_text"].strip()
    (tmp_path / "memorized_windows_z.jsonl").write_text(json.dumps(row))
    (task,), _ = skill_tasks(lm, tmp_path, ["memorized_windows"])
    assert task.name == "memorized_windows (ids)"
    assert list(task.items[0][1:]) == [ids[:12], ids[12:]]
    (tmp_path / "memorized_windows_z.jsonl").unlink()
    short = {"prefix_text": "", "suffix_text": "a"}
    write(tmp_path, "memorized_windows*", [foreign, foreign | short])
    with pytest.raises(TaskError, match=r"memorized_windows.*jsonl, line 2: too short"):
        skill_tasks(lm, tmp_path, ["memorized_windows"])
    write(tmp_path, "memorized_windows*", [{"prefix_ids": [99_999], "suffix_ids": [1]}])
    with pytest.raises(TaskError, match="line 1: its ids are not of this tokenizer"):
        skill_tasks(lm, tmp_path, ["memorized_windows"])


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real evaluation data beside the project")
def test_every_real_local_file_works(lm, tmp_path):
    files = {path.stem for path in REAL.glob("*.jsonl")}
    for path in REAL.glob("*.jsonl"):
        (tmp_path / path.name).symlink_to(path.resolve())
    # The tiny vocabulary has no token for most characters of other languages.
    windows = (REAL / "memorized_windows_olmo2_1b.jsonl").read_text().splitlines()
    texts = [(json.loads(one)["prefix_text"], json.loads(one)["suffix_text"]) for one in windows]
    plain = [one for one, (a, b) in zip(windows, texts) if (a + b).isascii() and b.strip()]
    (tmp_path / "memorized_windows_olmo2_1b.jsonl").unlink()
    (tmp_path / "memorized_windows_olmo2_1b.jsonl").write_text("\n".join(plain))
    served = {
        name
        for name, skill in SKILLS.items()
        if skill.file in files or skill.name == "memorized_windows" or skill.generate
    }
    tasks, left_out = skill_tasks(lm, tmp_path)
    assert set(SKILLS) - set(left_out) == served
    used = {SKILLS[task.name.split(" ")[0]].file for task in tasks}
    assert files - used == {"memorized_windows_olmo2_1b"}  # by its pattern
    sizes = {task.name: len(task) for task in tasks}
    assert sizes["gsm8k"] == 660
    assert sizes["quotes"] == 452
    assert sizes["memorized_windows (texts)"] == len(plain) > 100
    assert sizes["web_of_lies"] == 250 - SKILLS["web_of_lies"].shots
    assert sizes["mmlu_memory"] + sizes["mmlu_reasoning"] == 924 - 10
    relations = next(task for task in tasks if task.name == "relations")
    tags = {item.split("/")[0] for item, *_ in relations.items}
    assert len(tags) == 6
    assert not any("\\u" in answers[0] for *_, answers in relations.items)
