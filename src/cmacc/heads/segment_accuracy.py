"""Metrics of audio-visual event localisation: the class of every second, and the share of seconds that have it right.

1. A rule turns a head's scores into one class per second. Published repositories use four, named M1 to M4 here.
2. `segment_accuracy` is the share of all seconds of all videos in which that class is the label. Background is a class
   like the others, no second is ignored, and nothing is weighted.

=====  =============================  ==================================================================================
rule   function                       used by
=====  =============================  ==================================================================================
M1     `classes_per_second`           AVE (Tian et al., 2018) and PSP, both settings
M2     `gated_classes`, event         CMRAN, CMBS and CACE-Net, supervised
       classes only
M3     `gated_classes` with           CMRAN, weakly supervised
       background among the classes
M4     `released_weak_classes`        CMBS, weakly supervised
=====  =============================  ==================================================================================

Read plainly, event localisation says for each second whether there is an event, and which. M1 does. M2 and M3 allow one
event class per video, which AVE's videos have. M4 never says background, so it localises nothing. The most that such a
method can reach is the share of event seconds, 82.21 % of the published test split (81.79 % in validation); "always
background" reaches 17.79 %.

These numbers differ with the rule, so that figures by different rules are not comparable.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class EventError(ValueError):
    """Labels, scores, features or settings that event localisation cannot use."""


def classes_per_second(scores: Float[Tensor, "batch time classes"]) -> Int[Tensor, "batch time"]:
    """M1: the class with the highest score in each second, background among them; ties go to the lower class.

    The published code takes scores after a softmax. Its class is that of the logits. In the weak setting they are the
    scores before pooling over time.
    """
    return scores.argmax(-1)


def gated_classes(
    class_scores: Float[Tensor, "batch classes"], event: Float[Tensor, "batch time"], background: int
) -> Int[Tensor, "batch time"]:
    """M2 and M3: the video's best class where there is an event, else background.

    Parameters
    ----------
    class_scores
        Scores of the video. M2: of the event classes 0 to ``background - 1``. M3: of background too, the last; if it
        is the best, all of the video is background.
    event
        Probability of an event in each second, in [0, 1]. There is one above 0.5, not at 0.5.
    background
        Label of seconds without an event.

    Raises
    ------
    EventError
        The number of classes fits neither rule.
    """
    if class_scores.shape[1] not in (background, background + 1):
        raise EventError(
            f"event localisation: class_scores must have {background} event classes, or those and background, got "
            f"{class_scores.shape[1]}"
        )
    best = class_scores.argmax(1)
    return torch.where(event > 0.5, best[:, None], background)


def released_weak_classes(
    class_scores: Float[Tensor, "batch classes"], gates: Float[Tensor, "batch time"], background: int
) -> Int[Tensor, "batch time"]:
    """M4: `gated_classes` with sigma(gate) as the event's probability, as CMBS's code has it, for its figures only.

    A gate is already a probability in (0, 1), so that sigma(gate) is above 0.5: every second gets the video's class.
    The sound form, which CMBS's weak head uses by default, is `gated_classes` with the gates themselves.
    """
    return gated_classes(class_scores, gates.sigmoid(), background)


def segment_accuracy(predicted: Int[Tensor, "batch time"], labels: Int[Tensor, "batch time"]) -> float:
    """Share of seconds whose predicted class is the label, in [0, 1].

    Over all seconds at once. Published scripts average over batches weighted by their size, which is the same.

    Raises
    ------
    EventError
        The shapes differ, or there is no second.
    """
    if predicted.shape != labels.shape or predicted.numel() == 0:
        raise EventError(
            "segment accuracy: predicted and labels must have the same shape (videos, seconds), neither of them 0, got "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    return float((predicted == labels).double().mean())


def event_auroc(scores: Float[Tensor, "batch time"], event: Bool[Tensor, "batch time"]) -> float:
    """Probability that a random event second has a higher score than a random second without; ties count half.

    NaN if there are no event seconds, or only such: there is nothing to tell apart.

    Raises
    ------
    EventError
        The shapes differ, or a score is not finite.
    """
    from sklearn.metrics import roc_auc_score

    if scores.shape != event.shape:
        raise EventError(
            f"event AUROC: scores and event must have one shape, got {tuple(scores.shape)} and {tuple(event.shape)}"
        )
    if not scores.isfinite().all():
        raise EventError("event AUROC: scores must be finite, got NaN or infinity")
    truth = event.flatten().cpu().numpy()
    if len(np.unique(truth)) < 2:
        return math.nan
    return float(roc_auc_score(truth, scores.detach().double().flatten().cpu().numpy()))


def video_classes(labels: Int[Tensor, "batch time"], background: int) -> Int[Tensor, " batch"]:
    """The event class of each video, ``background`` if it has no event: the label of the weak setting.

    The published weak labels have an event class for every video of the set, also for the one whose interval is empty.
    Here that one is background, which is what its seconds say.

    Raises
    ------
    EventError
        A label is not in [0, background], or a video has two event classes.
    """
    event = labels != background
    lowest = torch.where(event, labels, background).amin(1)
    highest = torch.where(event, labels, -1).amax(1)
    if bool(((lowest < 0) | (highest > background)).any()):
        raise EventError(
            f"event labels: must be in [0, {background}] with {background} for background, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    mixed = (highest >= 0) & (lowest != highest)
    if bool(mixed.any()):
        row = int(mixed.nonzero()[0])
        raise EventError(
            f"event labels: a video must have one event class, got {int(lowest[row])} and {int(highest[row])} in row "
            f"{row} of the batch"
        )
    return lowest
