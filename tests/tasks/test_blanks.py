from dataclasses import replace

import torch
from skill_rows import rows_of, write

from lirefs import ShortAnswer
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.task import FilledBlank


def test_a_blank_is_scored_by_the_text_after_it_alone(lm):
    items = [
        ("1", ("some shots. Ann", "some shots. Evelyn"), " was glad.", 0),
        ("2", ("some shots. Bo", "some shots. Christopher"), "!", 1),
    ]
    counted = []
    results = FilledBlank("blanks", items).run(lm, counted.append)
    assert sum(counted) == 2
    for result, (_, contexts, ending, answer) in zip(results, items):
        values = []
        for context in contexts:
            ids = torch.tensor(lm.encode([context + ending]))
            start = len(lm.encode([context])[0])
            with torch.no_grad():
                logits = lm.model(ids).logits[0].double().log_softmax(-1)
            steps = range(start, ids.shape[1])
            values.append(sum(float(logits[step - 1, ids[0, step]]) for step in steps))
        chosen = values.index(max(values))
        assert result.output == contexts[chosen]
        assert result.scores == {"accuracy": float(chosen == answer)}
        assert result.expected == contexts[answer]


def test_worked_answers_end_at_their_line_and_count_what_is_unparsable(lm, monkeypatch):
    said = ["5 + 6 = 11. The answer is 11.\nThe answer is 12.", "I think 11.", ""]

    def greedy(lm, prompts, max_new_tokens, *, stop, advance):
        assert max_new_tokens == 40
        assert stop(lm.tokenizer.eos_token_id)
        assert not stop(lm.encode(["a"], add_special_tokens=False)[0][0])
        advance(len(prompts))
        return [list(range(len(prompts)))[i : i + 1] for i in range(len(prompts))]

    monkeypatch.setattr("lirefs.tasks.task.greedy", greedy)
    monkeypatch.setattr(type(lm.tokenizer), "decode", lambda self, ids, **_: said[ids[0]])
    monkeypatch.setattr(
        type(lm), "encode", lambda self, prompts, **_: [[ord(one[0]) - 29] for one in prompts]
    )
    said += [""] * 200
    items = [(str(i), "prompt", ["11"]) for i in range(3)]
    results = ShortAnswer("worked", items, kind="worked", max_new_tokens=40).run(lm, lambda n: None)
    assert [one.scores["accuracy"] for one in results] == [1, 0, 0]
    assert [one.parsed for one in results] == [True, False, False]
    assert results[0].output == "5 + 6 = 11. The answer is 11."


def test_skills_run(lm, tmp_path):
    """One of each kind, with prompts short enough for the tiny model."""
    for file in ("relations", "winogrande", "bbh_boolean_expressions"):
        write(tmp_path, file, [r | {"object": "x"} for r in rows_of(file)])
    names = ["relations", "winogrande", "boolean_expressions", "simple_math", "boar_etruscan"]
    for task in skill_tasks(lm, tmp_path, names, limit=2)[0]:
        results = task.run(lm, lambda n: None)
        assert [one.id for one in results] == [item[0] for item in task.items]
        assert all(one.scores["accuracy"] in (0, 1) for one in results)
        alone = [replace(task, items=[item]).run(lm, lambda n: None)[0] for item in task.items]
        assert results == alone  # an item is scored from itself alone
