"""Both halves in twenty lines: steer along a LiReF, then edit weights by curvature.

    python examples/quickstart.py

Takes 15 seconds on two cores.
"""

import argparse

argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()

import lirefs

lm = lirefs.load("organism")  # or a hub id, a folder, a .gguf file
probe = lirefs.fit(lm, lirefs.load_questions("organism"), layers=[1])
steer = lirefs.Steer(probe.best, "add", 2.0)
prompt = "Paul Nash lives in Paris. So Paul Nash lives in"
print("unsteered:", lm.generate(prompt, max_new_tokens=1))
with steer.apply(lm.model):
    print("steered:", lm.generate(prompt, max_new_tokens=1))

import kfac
from lirefs.organism import Language, training_texts

factors = kfac.collect(lm, training_texts(Language(), 200), layers=[3])
edit = kfac.CurvatureEdit(factors, keep=0.9)
verse = "Verse: long vase plate shiny plain cup rusty broken firefighter sailor huge broken"
print("unedited:", lm.generate([verse, "Math: 31 + 27 ="], max_new_tokens=3))
with edit.apply(lm.model):
    print("edited:", lm.generate([verse, "Math: 31 + 27 ="], max_new_tokens=3))
