"""When training and validation loss part: the model learns its rows by heart, and a sentence says so."""
from __future__ import annotations

MARGIN = 0.02  # the validation loss has to be above its lowest by 2 % of it ...
EVALUATIONS = 2  # ... in this many evaluations in a row, so that noise of a small validation set is no finding


def divergence(lines: list[dict]) -> str | None:
    """A sentence if the validation loss rose while the training loss went on falling, from the lines of metrics.jsonl.

    The last EVALUATIONS evaluations are above the lowest by more than MARGIN, and the training loss is lower than it
    was at the lowest, by more than MARGIN as well. Only the newest stage counts: losses of two mixtures differ anyway.

        validation 2.0 1.8 1.7 1.9 2.1     training 2.1 1.6 1.2 0.8 0.5     -> lowest 1.7, now 2.1; fell from 1.2 to 0.5
    """
    training = [line for line in lines if "loss" in line]
    if not training:
        return None
    stage = training[-1].get("stage")
    before = max((line["step"] for line in training if line.get("stage") != stage), default=0)
    training = [line for line in training if line["step"] > before]
    found = [line for line in lines if "eval_loss" in line and line["step"] > before]
    best = min(found, key=lambda line: line["eval_loss"], default=None)
    latest = found[-EVALUATIONS:]
    if best is None or len(latest) < EVALUATIONS or any(
            line["eval_loss"] <= best["eval_loss"] * (1 + MARGIN) for line in latest):
        return None
    then, now = (_training_loss(training, line["step"]) for line in (best, latest[-1]))
    if then is None or now is None or now >= then * (1 - MARGIN):
        return None
    last = latest[-1]
    return (f"validation loss was lowest at step {best['step']:,} ({best['eval_loss']:.4f}) and is "
            f"{last['eval_loss']:.4f} at step {last['step']:,}, while the training loss fell from {then:.4f} "
            f"to {now:.4f}: the model is learning its rows by heart. The weights of the best step are kept; "
            "fewer epochs, a lower learning rate or more weight decay help")


def _training_loss(training: list[dict], step: int) -> float | None:
    """The training loss that was logged last at a step, or first after it where none was."""
    until = [line["loss"] for line in training if line["step"] <= step]
    return until[-1] if until else training[0]["loss"] if training else None
