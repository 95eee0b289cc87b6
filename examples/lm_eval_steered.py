"""Evaluate a steered model with lm-evaluation-harness, which calls the model that it is given.

pip install 'lm-eval>=0.4.9'
python examples/lm_eval_steered.py [MODEL] [TASK] [LIMIT] [FOLDER OF YOUR OWN TASKS]
"""

import sys

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:
    sys.exit("lm-evaluation-harness is missing: pip install 'lm-eval>=0.4.9'")

import lirefs

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
task = sys.argv[2] if len(sys.argv) > 2 else "arc_easy"
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 50
known = TaskManager(include_path=sys.argv[4] if len(sys.argv) > 4 else None)

lm = lirefs.load(model)
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0), shuffles=10)
for name, steer in {"steered": probe.best.steer("add", 1.0), "unsteered": None}.items():
    with lirefs.intervention.applied(steer, lm.model):
        evaluated = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8)
        found = lm_eval.simple_evaluate(
            evaluated, tasks=[task], task_manager=known, limit=limit, bootstrap_iters=0
        )
    print(name, found["results"][task])
