"""Instruments by two towers: which of audio tower, projection and text tower is weak. Arrays in, numbers out.

1. Audio alone: a class's prototype is the direction of the mean of its sounds. The nearest prototype by cosine names a
   sound. Leave one out: a sound is no part of its own class's prototype.
2. The same before the joint space (what the audio tower gives) and in it (after its projection).
3. Zero-shot: the nearest text of a class, a prompt with its name, in the joint space.
4. Triplets of an ontology (`cmacc.heads.instrument_ontology`) on the means of audio classes and on texts.

Accuracy lost between the two spaces of step 2 is lost in the audio's projection; accuracy lost between audio alone and
texts in the joint space is lost in the text. Its triplets tell whether at least the texts keep the order of the tree.

Source: Vasilakis, Bittner and Pauwels 2024, "I can listen but cannot read: an evaluation of two-tower multimodal
systems for instrument recognition" (ISMIR, arXiv 2407.18058). Its prototypes contain the sound that is asked about,
which flatters small classes most; `PrototypeForm` ``published`` is that form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cmacc.heads.instrument_ontology import (
    InstrumentError,
    instrument_named,
    sound_triplets,
    tree_distances,
    triplet_accuracy,
)
from cmacc.pretraining.clip_encoder import ClipEncoder
from cmacc.pretraining.features import unit_rows
from cmacc.transfer.protocols import classes_ahead, text_cosines
from cmacc.transfer.text import class_prompt, encode_text

PrototypeForm = Literal["leave_one_out", "published"]
"""``leave_one_out``: means of normalised vectors without the sound itself; ``published``: of raw ones, with it."""
PromptForm = Literal["track", "recording", "solo", "sound", "negated", "random"]
"""Name of a form of prompt."""
PROMPTS: dict[PromptForm, str] = {
    "track": "A {} track",
    "recording": "This is a recording of {}",
    "solo": "Solo musical instrument sound of {}",
    "sound": "Sound of {} musical instrument",
    "negated": "A no {} track",
}
"""The paper's templates. ``random``, the name and a sentence of placeholder words, has another one for each class."""
_PLACEHOLDERS = (
    "lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit", "sed", "eiusmod", "tempor",
    "incididunt", "labore", "magna", "aliqua", "enim", "minim", "veniam", "quis", "nostrud", "ullamco", "laboris",
)  # fmt: skip
_PLACEHOLDER_COUNT = 8
_MOST_TOP = 5


def prompt_texts(form: PromptForm, classes: Sequence[str], *, seed: int = 0) -> list[str]:
    """The prompt of each class; ``seed`` draws the words of form ``random``, which the paper left to chance.

    Examples
    --------
    >>> prompt_texts("sound", ["bass tuba", "oboe"])
    ['Sound of bass tuba musical instrument', 'Sound of oboe musical instrument']
    """
    if form != "random":
        return [class_prompt(PROMPTS[form], name) for name in classes]
    generator = np.random.default_rng(seed)
    drawn = [" ".join(generator.choice(_PLACEHOLDERS, _PLACEHOLDER_COUNT)) for _ in classes]
    return [class_prompt(f"{{}} {words}.", name) for words, name in zip(drawn, classes, strict=True)]


def prompt_embeddings(
    encoder: ClipEncoder, forms: Sequence[PromptForm], classes: Sequence[str], *, seed: int = 0
) -> Float[NDArray[Any], "forms classes width"]:
    """Embeddings of the classes' prompts in the space of an encoder's audio features.

    Raises
    ------
    EncoderError, TowerError
        As in `cmacc.transfer.text.encode_text`: the encoder has no text side for audio, for instance.
    """
    texts = [text for form in forms for text in prompt_texts(form, classes, seed=seed)]
    rows = encode_text(encoder, texts, "audio").cpu().numpy()
    return np.asarray(rows.reshape(len(forms), len(classes), -1), np.float32)


@dataclass(frozen=True, eq=False)
class ClassScores:
    """How well scores of classes name the sounds.

    Attributes
    ----------
    top_k
        Share of sounds whose class is among the k highest, for k from 1 to 5 (or all classes, if fewer). A wrong class
        with an equal score counts as ahead.
    weighted_f1
        F1 of the highest class, averaged over classes by their number of sounds.
    roc_auc, pr_auc
        Area under the ROC curve, and average precision, of each class's raw scores against the rest; mean over classes.
    correct
        Shape (n,): 1 if the class is the highest, else 0; for an interval by `cmacc.transfer.metrics.summarised`.
    """

    top_k: tuple[float, ...]
    weighted_f1: float
    roc_auc: float
    pr_auc: float
    correct: NDArray[np.float64]

    @property
    def numbers(self) -> dict[str, float]:
        """By the name of the metric."""
        tops = {f"top-{k}": share for k, share in enumerate(self.top_k, start=1)}
        return {**tops, "weighted F1": self.weighted_f1, "ROC-AUC": self.roc_auc, "PR-AUC": self.pr_auc}


def class_scores(scores: Float[NDArray[Any], "n classes"], labels: Int[NDArray[Any], "n"]) -> ClassScores:
    """Measure scores, such as cosines, of every sound with every class.

    Classes without a sound are candidates, but count in no mean over classes.

    Raises
    ------
    InstrumentError
        Scores are not finite, a label is not one of the classes, or fewer than 2 classes have a sound.
    """
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    count = scores.shape[1]
    _check_rows("scores", scores, labels, count)
    present = np.unique(labels)
    if len(present) < 2:
        raise InstrumentError(f"labels: must be of at least 2 classes, got {len(present)}")
    ahead = classes_ahead(np.asarray(scores, np.float64), np.asarray(labels, np.int64))
    is_class = labels[:, None] == present
    return ClassScores(
        tuple(float((ahead < k).mean()) for k in range(1, min(_MOST_TOP, count) + 1)),
        float(f1_score(labels, scores.argmax(axis=1), average="weighted", zero_division=0.0)),
        float(np.mean([roc_auc_score(is_class[:, i], scores[:, c]) for i, c in enumerate(present)])),
        float(np.mean([average_precision_score(is_class[:, i], scores[:, c]) for i, c in enumerate(present)])),
        (ahead < 1).astype(np.float64),
    )


def prototype_cosines(
    embeddings: Float[NDArray[Any], "n width"],
    labels: Int[NDArray[Any], "n"],
    class_count: int,
    form: PrototypeForm = "leave_one_out",
) -> Float[NDArray[Any], "n classes"]:
    """Cosines of every sound with the prototype of every class.

    Raises
    ------
    InstrumentError
        Embeddings are not finite, a label is not one of the classes, or a class has too few sounds: 2 are needed to
        leave one out.
    """
    if form not in get_args(PrototypeForm):
        raise InstrumentError(f"prototypes: form must be one of {', '.join(get_args(PrototypeForm))}, got {form!r}")
    _check_rows("embeddings", embeddings, labels, class_count)
    counts = np.bincount(labels, minlength=class_count)
    least = 2 if form == "leave_one_out" else 1
    if counts.min() < least:
        raise InstrumentError(
            f"prototypes: class {int(counts.argmin())} must have at least {least} sounds, got {counts.min()}; leave "
            "the class out"
        )
    rows = unit_rows(embeddings)
    summed = rows if form == "leave_one_out" else embeddings.astype(np.float64)
    sums = np.zeros((class_count, rows.shape[1]))
    np.add.at(sums, labels, summed)
    cosines = rows @ unit_rows(sums).T
    if form == "leave_one_out":
        # Only the direction of a mean matters, so that sums do.
        cosines[np.arange(len(rows)), labels] = (rows * unit_rows(sums[labels] - rows)).sum(axis=1)
    return np.asarray(np.round(cosines, 12), np.float64)


def prototype_accuracy(
    embeddings: Float[NDArray[Any], "n width"],
    labels: Int[NDArray[Any], "n"],
    class_count: int,
    form: PrototypeForm = "leave_one_out",
) -> float:
    """Share of sounds whose nearest prototype (`prototype_cosines`) is that of their class."""
    cosines = prototype_cosines(embeddings, labels, class_count, form)
    return float((classes_ahead(cosines, np.asarray(labels, np.int64)) < 1).mean())


@dataclass(frozen=True, eq=False)
class TowerReport:
    """The towers side by side.

    Attributes
    ----------
    count, chance, majority
        Number of sounds, top-1 of uniform guessing, and of always naming the largest class.
    audio_before, audio_joint
        Prototypes of the audio before the joint space (None: not given) and in it.
    zero_shot
        Texts against audio in the joint space.
    triplet_count
        Number of sound triplets of the classes that the ontology has.
    audio_before_triplets, audio_joint_triplets, text_before_triplets, text_joint_triplets
        Share of them that the means of audio classes, and the texts, keep; chance is one half. None if there are no
        embeddings or no triplets.
    """

    count: int
    chance: float
    majority: float
    audio_before: ClassScores | None
    audio_joint: ClassScores
    zero_shot: ClassScores
    triplet_count: int
    audio_before_triplets: float | None
    audio_joint_triplets: float | None
    text_before_triplets: float | None
    text_joint_triplets: float | None

    @property
    def lost_in_projection(self) -> float | None:
        """Top-1 that the audio loses on its way into the joint space; None without embeddings before it."""
        return None if self.audio_before is None else self.audio_before.top_k[0] - self.audio_joint.top_k[0]

    @property
    def lost_in_text(self) -> float:
        """Top-1 that is lost where texts stand for the classes in place of sounds, all in the joint space."""
        return self.audio_joint.top_k[0] - self.zero_shot.top_k[0]

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """The table: what was measured, and its numbers by name."""
        parts: tuple[tuple[str, ClassScores | None, float | None], ...] = (
            ("audio before the joint space", self.audio_before, self.audio_before_triplets),
            ("audio in the joint space", self.audio_joint, self.audio_joint_triplets),
            ("text before the joint space", None, self.text_before_triplets),
            ("zero-shot: text in the joint space", self.zero_shot, self.text_joint_triplets),
        )
        table: dict[str, dict[str, float]] = {}
        for name, scores, triplets in parts:
            numbers = {} if scores is None else dict(scores.numbers)
            if triplets is not None:
                numbers["triplets"] = triplets
            if numbers:
                table[name] = numbers
        return table


def tower_report(
    audio_before: Float[NDArray[Any], "n before"] | None,
    audio_joint: Float[NDArray[Any], "n joint"],
    text_joint: Float[NDArray[Any], "templates classes joint"],
    labels: Int[NDArray[Any], "n"],
    classes: Sequence[str],
    *,
    text_before: Float[NDArray[Any], "templates classes text"] | None = None,
    form: PrototypeForm = "leave_one_out",
) -> TowerReport:
    """Measure audio before the joint space, audio in it, and texts against audio in it.

    Parameters
    ----------
    audio_before
        What the audio tower gives before its projection, one row a sound; None if it is not at hand.
    audio_joint
        The same sounds in the joint space.
    text_joint
        Embeddings of the classes' names in one or more templates, in the joint space.
    labels
        Numbers of the sounds' classes.
    classes
        Names of the classes; those that the ontology knows make the triplets.
    text_before
        What the text tower gives before its projection.
    form
        How prototypes are made.

    Raises
    ------
    InstrumentError
        Shapes do not fit, values are not finite, a class has too few sounds, or two classes are one instrument.
    ProtocolError
        The texts have another width than the audio in the joint space.
    """
    for name, texts in (("text_joint", text_joint), ("text_before", text_before)):
        if texts is not None and (texts.ndim != 3 or texts.shape[1] != len(classes) or 0 in texts.shape):
            raise InstrumentError(
                f"{name}: must have shape (templates, {len(classes)}, width), none of them 0, got {texts.shape}"
            )
    known = [i for i, name in enumerate(classes) if instrument_named(name) is not None]
    triplets = sound_triplets(tree_distances([classes[i] for i in known]))
    joint = class_scores(prototype_cosines(audio_joint, labels, len(classes), form), labels)
    before = None
    if audio_before is not None:
        before = class_scores(prototype_cosines(audio_before, labels, len(classes), form), labels)
    zero_shot = class_scores(
        text_cosines(np.asarray(audio_joint, np.float32), np.asarray(text_joint, np.float32)), labels
    )
    kept = [
        None if rows is None or not len(triplets) else triplet_accuracy(rows[known], triplets)
        for rows in (
            _class_means(audio_before, labels, len(classes)),
            _class_means(audio_joint, labels, len(classes)),
            _text_means(text_before),
            _text_means(text_joint),
        )
    ]
    return TowerReport(
        len(labels),
        1 / len(classes),
        float(np.bincount(labels).max() / len(labels)),
        before,
        joint,
        zero_shot,
        len(triplets),
        *kept,
    )


def _class_means(
    rows: NDArray[np.floating[Any]] | None, labels: NDArray[np.integer[Any]], count: int
) -> NDArray[np.float64] | None:
    if rows is None:
        return None
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, labels, unit_rows(rows))
    return sums


def _text_means(texts: NDArray[np.floating[Any]] | None) -> NDArray[np.float64] | None:
    return None if texts is None else np.stack([unit_rows(of_template) for of_template in texts]).mean(axis=0)


def _check_rows(name: str, rows: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], count: int) -> None:
    if rows.ndim != 2 or 0 in rows.shape or labels.shape != rows.shape[:1]:
        raise InstrumentError(f"{name}: must have a row for each of {len(labels)} labels, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows)).any(axis=1).sum())
        raise InstrumentError(f"{name}: must be finite, got NaN or infinity in {bad} of {len(rows)} rows")
    if labels.min() < 0 or labels.max() >= count:
        raise InstrumentError(f"labels: must be in [0, {count}), got {labels.min()} to {labels.max()}")
