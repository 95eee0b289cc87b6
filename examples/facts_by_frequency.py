"""Which facts an edit removes: the change in each class of facts, the K-FAC paper's figure 5.

    python examples/facts_by_frequency.py [--limit N] [--out FILE]
    python examples/facts_by_frequency.py --relations FILE --model NAME [--keep KEEP]

Takes a minute on two cores, a third of it with `--limit 10`, whose intervals are wide. The facts of
the organism come in five classes, by how often training showed them. With FILE (JSON Lines with
relation, prompt, subject, object), the classes are relations, whose frequency is unknown.
"""

import argparse
from pathlib import Path

import kfac
import lirefs
from lirefs.comparison import changes_by_tag, flips, tag_bars
from lirefs.files import atomic_write_bytes, read_jsonl
from lirefs.organism import Language, training_texts

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--relations", type=Path, help="JSON Lines of facts")
parser.add_argument("--model", default="organism", help="built-in name, hub id or folder")
parser.add_argument("--keep", type=float, default=0.98, help="share of the curvature mass")
parser.add_argument("--limit", type=int, default=40, help="items per class")
parser.add_argument("--out", type=Path, default=Path("facts_by_frequency.png"))
options = parser.parse_args()

lm = lirefs.load(options.model)
classes, numbers = {}, None
if options.relations is None:
    texts, layers = training_texts(Language(), 10 * options.limit), None
    for fact in Language().facts_of("test"):
        items = classes.setdefault(f"shown {fact.frequency} x", [])
        items.append((fact.item().prompt, fact.value))
    numbers = {f"shown {f} x": f for f in {fact.frequency for fact in Language().facts}}
else:
    texts, layers = lirefs.calibration_texts()[: options.limit], [lm.n_layers * 2 // 3]
    for _, row in read_jsonl(options.relations):
        items = classes.setdefault(row["relation"], [])
        items.append((row["prompt"].format(row["subject"]), row["object"]))
task = lirefs.ShortAnswer(
    "facts",
    [
        (f"{tag}/{number}", prompt, [answer])
        for tag, items in classes.items()
        for number, (prompt, answer) in enumerate(items[: options.limit])
    ],
)
factors = kfac.collect(lm, texts, layers=layers)
comparison = lirefs.compare(lm, {"K-FAC": kfac.CurvatureEdit(factors, options.keep)}, [task])

found = changes_by_tag(comparison, "facts", "K-FAC", numbers)
for one in found.tags:
    print(f"{one.tag:24s} unchanged {one.before:.2f}, change {one.change}, n = {one.change.n}")
if found.spearman is not None:
    print(f"Spearman correlation of change and frequency {found.spearman}, p = {found.p_value:.3f}")
for flip in flips(comparison, "facts", "K-FAC")[:3]:
    print(f"{flip.prompt!r}: {flip.before!r} -> {flip.after!r}, expected {flip.expected!r}")
atomic_write_bytes(options.out, tag_bars(found).png)
print(f"wrote {options.out}")
