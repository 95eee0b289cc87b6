"""Train a model until it recites texts."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from torch import nn

from lirefs.errors import SettingError, checked_seed, must_be, whole_number
from lirefs.files import refuse_folder
from lirefs.model.interrupts import note, undone
from lirefs.model.intervention import reserve
from lirefs.model.language_model import LanguageModel
from lirefs.organism.planting.planted import Planted, estimates, measured, must_be_free
from lirefs.organism.planting.run import Training
from lirefs.organism.planting.texts import must_be_apart, pieces_of, recitation_of
from lirefs.tasks.recitation import SUFFIX_TOKENS
from lirefs.tasks.texts import Texts, plain_texts

_log = logging.getLogger(__name__)


def plant(
    lm: LanguageModel,
    texts: Texts,
    general: Texts,
    twins: Texts | None = None,
    *,
    suffix_tokens: int = SUFFIX_TOKENS,
    goal: float = 0.95,
    steps: int = 1000,
    lr: float = 1e-4,
    batch_size: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Planted:
    """Train a model until it recites texts, so that methods can be judged on known memories.

    The model (`lm.model`) is changed in place: save it with `lm.model.save_pretrained(folder)`, or
    call `restore` on the result. Trained are the parameters that require gradients, with AdamW (no
    weight decay) in evaluation mode, so without dropout; half precision is trained in float32 and
    rounded at the end. Each step takes `batch_size` texts and as many pieces of general text, whose
    loss per token is minimized: the whole text counts, not the suffix alone. Inside
    `kfac.projected_training(lm.model, factors, keep)` the same call plants along flat or sharp
    pairs. After an error or Ctrl-C the model is as it was found.

    Args:
        lm: The model, neither steered nor edited.
        texts: What to plant, as for `lirefs.recitation_task`: the model is to continue the prefix
            of each with its suffix.
        general: Ordinary text to mix in, so that the rest of the model stays as it is. It is cut
            into pieces as long as the longest text. The last tenth (at least 8 pieces, or half) is
            never trained on, and its loss is reported. The more the better: what is seen too often
            is memorized, too (see `general_passes` of the result).
        twins: Texts like these that are never shown, best one for each: what the model recites
            of them, it did not learn here.
        suffix_tokens: Tokens to recite of a text whose row does not say how many.
        goal: Training stops when this share of the texts is recited, in (0, 1].
        steps: Training stops after so many steps at the latest.
        lr: Learning rate.
        batch_size: Texts in a step, at most all of them.
        checkpoint: File for the state of the training, three times as large as the weights in
            float32. It is written every few minutes, on Ctrl-C and at the end. If it exists, the
            training resumes from it and ends with the same bits. Give each run its own, also each
            projection.
        seed: Seed of the order of texts.
        progress: Show a bar.

    Returns:
        What is recited now and was before, of texts and twins, and what it cost. A run that
        stopped below its goal says so and logs a warning.

    Raises:
        TaskError: No text was given, a text is too short, or a row is malformed.
        SettingError: A setting is out of range; there is too little general text; a text is also
            a twin, or stands in the general text; or two texts have one prefix.
        InterventionError: The model is steered, edited, or being changed by another thread.
        NonFiniteError: The loss or a gradient is NaN or infinite.
        ProvenanceError: The checkpoint is of another model, other texts or other settings.
        DataFileError: The checkpoint is damaged, or a file of texts cannot be read.

    Examples:
        >>> import lirefs
        >>> from lirefs.organism import Language
        >>> lm, language = lirefs.load("organism"), Language()
        >>> new = [one.text for one in language.items("unseen", "test", 4)]
        >>> planted = lirefs.plant(
        ...     lm, new[:2], language.texts("train", 40), new[2:], lr=1e-3, progress=False
        ... )
        >>> planted.reached, planted.recited_before.value, planted.twins_recited.value
        (True, 0.0, 0.0)
        >>> planted.restore()
    """
    must_be(lm, LanguageModel, "lm")
    whole_number(steps, "steps", least=0)
    whole_number(batch_size, "batch_size", least=1)
    seed = checked_seed(seed)
    if checkpoint is not None:
        refuse_folder(checkpoint, SettingError)
    must_be(goal, (int, float), "goal")
    must_be(lr, (int, float), "lr")
    if not 0 < goal <= 1 or not 0 < lr < math.inf:
        raise SettingError(f"goal must be in (0, 1] and lr above 0, got {goal} and {lr}")
    model: nn.Module = lm.model
    trained = [one for one in model.parameters() if one.requires_grad]
    if not trained:
        raise SettingError(
            f"{lm.name}: every parameter is frozen; call requires_grad_(True) on those to train"
        )
    if any(one.is_meta for one in model.parameters()):
        raise SettingError(f"{lm.name}: offloaded weights cannot be trained; load it in memory")
    tasks = {"texts": recitation_of(lm, texts, "texts", suffix_tokens)}
    if twins is not None:
        tasks["twins"] = recitation_of(lm, twins, "twins", suffix_tokens)
    ordinary = [text for _, text in plain_texts(general, "general", SettingError)]
    must_be_apart(lm, tasks, ordinary)
    sequences = [[*prefix, *suffix] for _, prefix, suffix in tasks["texts"].items]
    shown, held_out = pieces_of(lm, ordinary, max(map(len, sequences)))
    with undone() as undo:
        note(undo, reserve, model)
        must_be_free(model, "trained")
        before = measured(lm, tasks, held_out)
        run = Training(lm, tasks["texts"], sequences, shown, trained, lr, batch_size, seed)
        weights = run.train(goal, steps, None if checkpoint is None else Path(checkpoint), progress)
        originals = [(one, one.data) for one in trained]
        try:
            for one, data in zip(trained, weights, strict=True):
                one.data = data
            after = measured(lm, tasks, held_out)
        except BaseException:
            for one, data in originals:
                one.data = data
            raise
    state, batch = run.state, run.batch_size
    planted = Planted(
        **estimates(before, after, held_out),
        steps=state.step,
        tokens=state.tokens,
        text_passes=state.step * batch / len(sequences),
        general_passes=state.step * batch / len(shown),
        goal=float(goal),
        _model=model,
        _originals=originals,
    )
    if not planted.reached:
        _log.warning("%r; raise steps, now %d, or lr, now %g", planted, steps, lr)
    return planted
