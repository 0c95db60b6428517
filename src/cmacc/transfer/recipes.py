"""The protocols by name: their definitions in words, with versions and sources.

Two results of the same name and version can be compared. To use another constant, change the code and the version.
"""

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["linear", "svm", "knn", "prototypes", "finetune", "retrieval", "zero_shot"]
"""Name of a protocol; `RECIPES` describes each."""


@dataclass(frozen=True)
class Recipe:
    """The fixed definition of a protocol under a name and a version.

    Attributes
    ----------
    name, version
        Results are comparable if both are the same.
    windows
        Number of equally spaced windows per file that are averaged.
    crops
        Number of crops per window that are averaged, for video. Audio is never cropped.
    summary
        The procedure, with its constants.
    source
        The papers that it follows.
    """

    name: ProtocolName
    version: int
    windows: int
    crops: int
    summary: str
    source: str


RECIPES: dict[ProtocolName, Recipe] = {
    "linear": Recipe(
        name="linear",
        version=1,
        windows=10,
        crops=1,
        summary=(
            "Multinomial logistic regression (L-BFGS, at most 1,000 iterations) on features averaged over windows and "
            "standardised with the training part; C from 1e-4, 1e-3, ..., 10 by 3-fold cross-validation within the "
            "training part, which splits no group."
        ),
        source="Radford et al. 2021 (CLIP), linear probe",
    ),
    "svm": Recipe(
        name="svm",
        version=1,
        windows=10,
        crops=1,
        summary=(
            "One-vs-rest linear SVM (squared hinge loss, C = 0.01) trained on every distinct window, with a total "
            "weight of one per file, standardised with the training part; decision values are averaged over the "
            "windows of a test file."
        ),
        source="Alwassel et al. 2020 (XDC); Morgado et al. 2021 (AVID-CMA)",
    ),
    "knn": Recipe(
        name="knn",
        version=1,
        windows=10,
        crops=1,
        summary=(
            "Vote of the 20 nearest training files by cosine similarity of features averaged over windows, each "
            "weighted by exp(cosine / 0.07)."
        ),
        source="Wu et al. 2018 (instance discrimination); Caron et al. 2021 (DINO)",
    ),
    "prototypes": Recipe(
        name="prototypes",
        version=1,
        windows=10,
        crops=1,
        summary=(
            "The class whose prototype is nearest by cosine similarity to the features of a held-out file, averaged "
            "over windows. A prototype is the direction of the mean of the normalised features of a class's training "
            "files. Also before the features (`audio_tower`, of a tower that projects into a space shared with text) "
            "and after them (`audio_joint`, `video_joint`, of encoders with a space shared by video and audio). A "
            "wrong class with an equal score counts as ahead of the right one. Where the task has an ontology: the "
            "share of its triplets (anchor, nearer class, farther class) whose order the prototypes of all files "
            "keep, with an interval over anchors."
        ),
        source="Snell et al. 2017 (prototypical networks); Vasilakis et al. 2024, of two-tower models",
    ),
    "finetune": Recipe(
        name="finetune",
        version=1,
        windows=10,
        crops=3,
        summary=(
            "The whole encoder and a new linear layer are trained on the labelled training part with a fixed schedule "
            "(20 epochs; AdamW, 3e-4 and 1e-3 for the new layer); softmax scores are averaged over 10 windows of a "
            "test file and, for video, over 3 crops of each window."
        ),
        source="Morgado et al. 2021 (AVID-CMA), whole network; Feichtenhofer et al. 2019 (SlowFast), views",
    ),
    "retrieval": Recipe(
        name="retrieval",
        version=1,
        windows=10,
        crops=1,
        summary=(
            "Labelled files: every test file queries the training files by cosine similarity of features averaged over "
            "windows; R@k is the share with a file of the same class among the k nearest. Pairs: the video of a file's "
            "middle window queries all audio for its own, and vice versa. A wrong row with an equal score counts as "
            "ahead of the right one."
        ),
        source="Xu et al. 2019 (clip order prediction); Han et al. 2020 (CoCLR)",
    ),
    "zero_shot": Recipe(
        name="zero_shot",
        version=1,
        windows=10,
        crops=1,
        summary=(
            "Without training files: the class whose text has the highest cosine similarity with the features of a "
            "held-out file, averaged over windows. The text of a class is its name (underscores and camel case as "
            "words) in one or more templates, which the card lists: normalised embeddings, their mean, normalised. By "
            "default `a video of {}.` or `the sound of {}.`, or the task's own. All classes of the manifest are "
            "candidates. A wrong class with an equal score counts as ahead of the right one. Where the task has an "
            "ontology: the share of its triplets that the texts keep (`audio_text`), as in `prototypes`."
        ),
        source="Radford et al. 2021 (CLIP), zero-shot transfer and prompt ensembles",
    ),
}
"""What each protocol does exactly, with its source."""


def windows_of(protocol: ProtocolName, task: str) -> int:
    """Number of windows per file that are averaged: the recipe's, but 1 for the task ``pairs``.

    That task matches video and audio of the same moment, which an average over windows blurs: on GRID, R@1 fell from 33
    to 22 %.
    """
    return 1 if task == "pairs" else RECIPES[protocol].windows


def crops_of(protocol: ProtocolName, modality: str) -> int:
    """Number of crops per window that are averaged: the recipe's for ``video``, 1 for audio and pairs."""
    return RECIPES[protocol].crops if modality == "video" else 1
