"""The skills of both papers, as a table: the memory, math, question and logic sets, and LiReF's.

Each skill reads `<folder>/<file>.jsonl` (JSON Lines, one object a line) if it is there, else a set
of the hub; skills without a file are generated from a seed.

| skill | file | fields | group | kind | chance |
|---|---|---|---|---|---|
| memorized_windows | memorized_windows* | ids and texts | memorization | recitation | 0 |
| quotes | quotes | prefix, suffix | memorization | recitation | 0 |
| gsm8k | gsm8k | question, answer | arithmetic | worked | 0 |
| gsm_symbolic | gsm_symbolic | question, answer | arithmetic | worked | 0 |
| mgsm | mgsm | question, answer, language | arithmetic | worked | 0 |
| multistep_arithmetic_two | bbh_* | input, target | arithmetic | worked | 0 |
| object_counting | bbh_* | input, target | arithmetic | worked | 0 |
| simple_math | | | arithmetic | number | 0 |
| generated_addition | | | arithmetic | number | 0 |
| mmlu_pro_math | mmlu_pro | lettered, category | arithmetic | choice | 1/10 |
| popqa | popqa | question, answers, relation | closed-book | text | 0 |
| triviaqa | triviaqa | question, answers | closed-book | text | 0 |
| relations | relations | relation, prompt, subject, object | closed-book | text | 0 |
| mmlu_memory | mmlu_reasoning_memory | lettered, label | closed-book | choice | 1/4 |
| ceval_h | ceval_h | lettered, subject | closed-book | choice | 1/4 |
| triviaqa_open | triviaqa | question, answers, context | open-book | text | 0 |
| boolq | boolq | passage, question, answer | open-book | choice | 1/2 |
| openbookqa | openbookqa | lettered | open-book | choice | 1/4 |
| openbookqa_fact | openbookqa | lettered, fact | open-book | choice | 1/4 |
| boar_etruscan | | | reasoning | words | 0 |
| winogrande | winogrande | sentence, option1, option2, answer | reasoning | blank | 1/2 |
| logical_deduction_three_objects | bbh_* | input, target | reasoning | choice | 1/3 |
| logical_deduction_five_objects | bbh_* | input, target | reasoning | choice | 1/5 |
| logical_deduction_seven_objects | bbh_* | input, target | reasoning | choice | 1/7 |
| tracking_shuffled_objects_three_objects | bbh_* | input, target | reasoning | choice | 1/3 |
| tracking_shuffled_objects_five_objects | bbh_* | input, target | reasoning | choice | 1/5 |
| tracking_shuffled_objects_seven_objects | bbh_* | input, target | reasoning | choice | 1/7 |
| boolean_expressions | bbh_* | input, target | reasoning | choice | 1/2 |
| web_of_lies | bbh_* | input, target | reasoning | choice | 1/2 |
| mmlu_reasoning | mmlu_reasoning_memory | lettered, label | reasoning | choice | 1/4 |
| mmlu_pro | mmlu_pro | lettered, category | reasoning | choice | 1/10 |
| generated_booleans | | | reasoning | choice | 1/2 |
| generated_tracking | | | reasoning | choice | 1/4 |
| generated_elimination | | | reasoning | choice | 1/3 |

Fields: `lettered` are `question`, `options` and `answer_index`; `ids and texts` are `prefix_ids`,
`suffix_ids`, `prefix_text` and `suffix_text`, of which the ids serve where they are of the model's
tokenizer, else the texts, and the name of the task says which; an `answer` to a word problem ends
in `#### N`, or is N; `answers` are all that count; `answer` of boolq is true or false, of
winogrande 1 or 2; a `sentence` holds one `_`, a `prompt` of relations one `{}` for the subject;
`label` is reasoning or memory; `language`, `relation` of popqa, `category` and `subject` of
ceval_h may be absent, but mmlu_pro_math needs its category; the file of a `bbh_*` skill is `bbh_`
and its name.

Kinds: `recitation` continues a text; `choice` compares the log-likelihoods of the options;
`blank` those of the text after a filled blank; `text`, `number`, `worked` and `words` are
generated greedily and read from one line: it begins with an answer, its first number, the number
of its last "The answer is N", all its words. What cannot be read is counted as unparsable.
Chance is the mean of 1 / number of options (MMLU-Pro has up to 10).

Groups are those of the K-FAC paper's figure 3, which has OpenBookQA as open-book with and without
its fact. MMLU-Pro as a whole mixes both; it stands with reasoning.

A relation with no more rows than answered examples is not tested.

Sources: Merullo et al. 2025, section 5 and figure 3 (evaluated with OLMES, whose prompts are not
in the paper; those here are this project's); Hong et al. 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lirefs.tasks import synthetic as generators
from lirefs.tasks.papers import prompts as readers
from lirefs.tasks.papers import prompts as worked_examples
from lirefs.tasks.papers import rows as sources
from lirefs.tasks.papers.prompts import Example
from lirefs.tasks.papers.rows import Hub, Row

Kind = Literal["choice", "blank", "text", "number", "worked", "words", "recitation"]


@dataclass(frozen=True)
class Skill:
    """One skill: where its rows are from, how they are asked and how they are scored.

    Attributes:
        name: Name of the task.
        group: One of `lirefs.tasks.task.GROUPS`.
        kind: How it is scored, see the module.
        read: A row as a question; None leaves the row out.
        file: Local file without `.jsonl`.
        hub: Set of the hub that serves without the file.
        shots: Number of answered examples before each question. They are never tested.
        shots_by_tag: Whether the examples are of the question's own tag.
        preamble: Fixed text before each question: worked examples.
        separator: What ends an answered example.
        max_new_tokens: Length limit of a generated answer.
        make: For generated skills: items for a number and a seed.
        missing: What to say when there is no local file and no set of the hub.
    """

    name: str
    group: str
    kind: Kind
    read: Callable[[Row], Example | None] | None = None
    file: str = ""
    hub: Hub | None = None
    shots: int = 0
    shots_by_tag: bool = False
    preamble: str = ""
    separator: str = "\n\n"
    max_new_tokens: int = 16
    make: Callable[[int, int], Sequence[Any]] | None = None
    missing: str = ""


def _grade_school(name: str, hub: Hub) -> Skill:
    shown = worked_examples.WORD_PROBLEMS
    return Skill(
        name,
        "arithmetic",
        "worked",
        readers.word_problem,
        name,
        hub,
        preamble=shown,
        max_new_tokens=300,
    )


def _bbh(name: str, group: str, kind: Kind, read: Callable[[Row], Example], **more: Any) -> Skill:
    hub = Hub("SaylorTwift/bbh", configs=(name,))
    return Skill(name, group, kind, read, f"bbh_{name}", hub, **more)


def _labelled(name: str, group: str, label: str) -> Skill:
    missing = (
        "the split into reasoning and memory needs rows with a 'label'; TIGER-Lab/MMLU-Pro has "
        "none (without the split: mmlu_pro)"
    )
    read = partial(readers.labelled, label=label)
    return Skill(name, group, "choice", read, "mmlu_reasoning_memory", shots=5, missing=missing)


_BOOLQ = Hub("google/boolq", "validation", shots_split="train")
_CEVAL_HUMANITIES = (
    "art_studies",
    "chinese_language_and_literature",
    "high_school_chinese",
    "high_school_history",
    "ideological_and_moral_cultivation",
    "law",
    "legal_professional",
    "logic",
    "middle_school_history",
    "modern_chinese_history",
    "professional_tour_guide",
)
_CEVAL = Hub("ceval/ceval-exam", "val", _CEVAL_HUMANITIES, "dev", sources.ceval_row, "subject")
_GSM8K = Hub("openai/gsm8k", configs=("main",))
_GSM_SYMBOLIC = Hub("apple/GSM-Symbolic", configs=("main",))
_MGSM_LANGUAGES = ("bn", "de", "fr", "ja", "ru", "sw", "te", "zh")
_MGSM = Hub(
    "juletxara/mgsm", configs=_MGSM_LANGUAGES, adapt=sources.mgsm_row, config_field="language"
)
_MMLU_PRO = Hub("TIGER-Lab/MMLU-Pro", shots_split="validation")
_OPENBOOKQA = Hub("allenai/openbookqa", "test", ("additional",), "train", sources.openbookqa_row)
_POPQA = Hub("akariasai/PopQA", adapt=sources.popqa_row)
_TRIVIAQA = partial(Hub, "mandarjoshi/trivia_qa", "validation", adapt=sources.triviaqa_row)
_WINOGRANDE = Hub("allenai/winogrande", "validation", ("winogrande_xl",), "train")

_read_math = partial(readers.in_category, category="math")
_read_by_category = partial(readers.lettered, tag="category")

_ALL = [
    # memory
    Skill("memorized_windows", "memorization", "recitation", file="memorized_windows*"),
    Skill("quotes", "memorization", "recitation", file="quotes"),
    # math
    _grade_school("gsm8k", _GSM8K),
    _grade_school("gsm_symbolic", _GSM_SYMBOLIC),
    _grade_school("mgsm", _MGSM),
    _bbh(
        "multistep_arithmetic_two",
        "arithmetic",
        "worked",
        readers.bbh_number,
        preamble=worked_examples.ARITHMETIC,
        max_new_tokens=200,
    ),
    _bbh(
        "object_counting",
        "arithmetic",
        "worked",
        readers.bbh_number,
        preamble=worked_examples.COUNTING,
        max_new_tokens=150,
    ),
    Skill("simple_math", "arithmetic", "number", make=generators.simple_math_items),
    Skill("generated_addition", "arithmetic", "number", make=generators.addition_items),
    Skill("mmlu_pro_math", "arithmetic", "choice", _read_math, "mmlu_pro", _MMLU_PRO, shots=5),
    # closed book
    Skill("popqa", "closed-book", "text", readers.question, "popqa", _POPQA, shots=5),
    Skill(
        "triviaqa",
        "closed-book",
        "text",
        readers.question,
        "triviaqa",
        _TRIVIAQA(configs=("rc.nocontext",)),
        shots=5,
    ),
    Skill(
        "relations",
        "closed-book",
        "text",
        readers.relation,
        "relations",
        shots=4,
        shots_by_tag=True,
        separator="\n",
    ),
    _labelled("mmlu_memory", "closed-book", "memory"),
    Skill(
        "ceval_h",
        "closed-book",
        "choice",
        readers.lettered_chinese,
        "ceval_h",
        _CEVAL,
        shots=5,
        shots_by_tag=True,
    ),
    # open book
    Skill(
        "triviaqa_open",
        "open-book",
        "text",
        readers.question_with_passage,
        "triviaqa",
        _TRIVIAQA(configs=("rc.wikipedia",)),
        shots=3,
    ),
    Skill("boolq", "open-book", "choice", readers.yes_or_no, "boolq", _BOOLQ, shots=4),
    Skill(
        "openbookqa", "open-book", "choice", readers.lettered, "openbookqa", _OPENBOOKQA, shots=5
    ),
    Skill(
        "openbookqa_fact",
        "open-book",
        "choice",
        readers.lettered_with_fact,
        "openbookqa",
        _OPENBOOKQA,
        shots=5,
    ),
    # logic
    Skill("boar_etruscan", "reasoning", "words", make=generators.boar_items, max_new_tokens=32),
    Skill("winogrande", "reasoning", "blank", readers.blank, "winogrande", _WINOGRANDE, shots=5),
    *(
        _bbh(f"{name}_{number}_objects", "reasoning", "choice", readers.bbh_options, shots=3)
        for name in ("logical_deduction", "tracking_shuffled_objects")
        for number in ("three", "five", "seven")
    ),
    _bbh(
        "boolean_expressions",
        "reasoning",
        "choice",
        readers.boolean_expression,
        shots=4,
        separator="\n",
    ),
    _bbh("web_of_lies", "reasoning", "choice", readers.web_of_lies, shots=4),
    _labelled("mmlu_reasoning", "reasoning", "reasoning"),
    Skill(
        "mmlu_pro",
        "reasoning",
        "choice",
        _read_by_category,
        "mmlu_pro",
        _MMLU_PRO,
        shots=5,
        shots_by_tag=True,
    ),
    Skill("generated_booleans", "reasoning", "choice", make=generators.boolean_items),
    Skill("generated_tracking", "reasoning", "choice", make=generators.tracking_items),
    Skill("generated_elimination", "reasoning", "choice", make=generators.elimination_items),
]
SKILLS: dict[str, Skill] = {skill.name: skill for skill in _ALL}
