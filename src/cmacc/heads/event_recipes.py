"""How each head of event localisation is trained and measured, under a name and a version.

They are no recipes of `cmacc.transfer.recipes`: those suit any labelled task and read none but whole files, these suit
task ``ave`` alone. Two results of the same name and version can be compared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cmacc.heads.cace_net import CaceNet
from cmacc.heads.cmbs import Cmbs, WeakCmbs
from cmacc.heads.event_linear import EventLinear, EventLinearConfig
from cmacc.heads.fit import FitConfig
from cmacc.heads.head import Head

EventProtocol = Literal["linear", "cmbs", "cace_net", "linear_weak", "cmbs_weak"]
"""A head, and whether it is trained with the classes of videos alone (weak); `EVENT_RECIPES` describes each."""
DEFAULT_EVENT_PROTOCOLS: tuple[EventProtocol, ...] = ("linear", "cmbs", "cace_net")

# The papers train for 200 epochs and report the best *test* epoch. Their learning rate is an eighth of its first value
# from epoch 30 (40) on, and the best epochs that they name are early (46 of CACE-Net).
_EPOCHS = 60
CMBS_TRAINING = FitConfig(
    epochs=_EPOCHS, batch_size=64, learning_rate=7e-4, milestones=(10, 20, 30), decay=0.5, max_gradient_norm=0.5
)
"""Of CMBS and CACE-Net, as published but for the number of epochs."""
WEAK_CMBS_TRAINING = FitConfig(
    epochs=_EPOCHS, batch_size=64, learning_rate=6e-4, milestones=(10, 20, 40), decay=0.5, max_gradient_norm=0.5
)
"""Of weak CMBS, as published but for the number of epochs."""
LINEAR_TRAINING = FitConfig(epochs=_EPOCHS, batch_size=64, learning_rate=1e-3, milestones=(20, 40))
"""Of the linear head; ours."""


@dataclass(frozen=True)
class EventRecipe:
    """The fixed definition of a protocol.

    Attributes
    ----------
    name, version
        Results are comparable if both are the same.
    build
        Makes the head for features of video and audio of given widths and a number of classes, in this order.
    training
        How it is trained; the seed is replaced.
    summary
        The procedure in words.
    source
        The papers that it follows.
    """

    name: EventProtocol
    version: int
    build: Callable[[int, int, int], Head]
    training: FitConfig
    summary: str
    source: str

    @property
    def is_weak(self) -> bool:
        """Whether training sees the classes of videos alone."""
        return self.name.endswith("_weak")


_COMMON = (
    "Ten windows a film. Adam, batches of 64, 60 epochs, of which the validation accuracy of seconds chooses one. "
    "Features of encoders are standardised with the training part, published ones are not. Accuracy over all seconds, "
    "background among the classes; mean over seeds."
)

EVENT_RECIPES: dict[EventProtocol, EventRecipe] = {
    "linear": EventRecipe(
        name="linear",
        version=1,
        build=EventLinear,
        training=LINEAR_TRAINING,
        summary=f"A linear layer on each second (M1). {_COMMON} Learning rate 1e-3, halved after epochs 20 and 40.",
        source="Tian et al. 2018 (AVE), for the task and the metric; the head is ours",
    ),
    "cmbs": EventRecipe(
        name="cmbs",
        version=1,
        build=Cmbs,
        training=CMBS_TRAINING,
        summary=(
            f"CMBS (M2). {_COMMON} Learning rate 7e-4, halved after epochs 10, 20 and 30; gradient norm at most 0.5. "
            "Published: 200 epochs, of which test accuracy chooses one."
        ),
        source="Xia and Zhao 2022 (CMBS)",
    ),
    "cace_net": EventRecipe(
        name="cace_net",
        version=1,
        build=CaceNet,
        training=CMBS_TRAINING,
        summary=f"CACE-Net (M2). {_COMMON} Learning rate, bound and published epochs as of `cmbs`.",
        source="He et al. 2024 (CACE-Net)",
    ),
    "linear_weak": EventRecipe(
        name="linear_weak",
        version=1,
        build=lambda video, audio, classes: EventLinear(video, audio, classes, EventLinearConfig(weak=True)),
        training=LINEAR_TRAINING,
        summary=(
            "As `linear`, trained on the class of each video: scores pooled by maximum over time (M1). With published "
            "features, their videos without any event are trained on, too."
        ),
        source="Tian et al. 2018 (AVE), weakly supervised; the head is ours",
    ),
    "cmbs_weak": EventRecipe(
        name="cmbs_weak",
        version=1,
        build=WeakCmbs,
        training=WEAK_CMBS_TRAINING,
        summary=(
            f"CMBS with the classes of videos alone (M3). {_COMMON} Learning rate 6e-4, halved after epochs 10, 20 and "
            "40; gradient norm at most 0.5. With published features, their videos without any event are trained on, "
            "too; without such videos, its gates cannot localise. Published: 200 epochs, chosen on test."
        ),
        source="Xia and Zhao 2022 (CMBS), weakly supervised",
    ),
}
"""What each protocol does exactly, with its source."""
