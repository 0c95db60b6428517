"""What is lost between rows of a card, in words, from cards made by hand."""

import dataclasses

from cmacc.pretraining import Provenance
from cmacc.transfer.card import Card, EncoderFacts, Result
from cmacc.transfer.stages import losses_in_words


def row(protocol: str, modality: str, value: float, half: float = 0.01, metric: str = "accuracy") -> Result:
    return Result(
        task="instruments",
        protocol=protocol,
        modality=modality,
        metric=metric,
        value=value,
        untrained=None,
        chance=0.1,
        count=200,
        version=1,
        windows=10,
        crops=1,
        low=value - half,
        high=value + half,
        by_split={"fold 1": value, "fold 2": value},
    )


def words(*results: Result) -> list[str]:
    facts = EncoderFacts("a", "b", "c", 0, 0, {})
    return losses_in_words(Card(facts, {}, results, Provenance({}, {}, "", 0, "")))


TOWER, OWN = row("prototypes", "audio_tower", 0.912), row("prototypes", "audio", 0.881)
TEXT = row("zero_shot", "audio", 0.479)


def test_a_tower_of_sound_and_text() -> None:
    own_triplets = row("prototypes", "audio", 0.6, metric="triplets")
    assert words(row("linear", "audio", 0.9), TOWER, OWN, own_triplets, TEXT) == [
        "instruments, audio: lost in the projection: 3.1 points (audio_tower 91.2 %, audio 88.1 %); "
        "lost in the text: 40.2 points (audio 88.1 %, zero_shot 47.9 %)"
    ]


def test_a_run_with_heads_and_other_tasks() -> None:
    other = [
        dataclasses.replace(row("prototypes", modality, value, half=0.05), task="labelled")
        for modality, value in (("video", 0.5), ("video_joint", 0.53))
    ]
    assert words(OWN, row("prototypes", "audio_joint", 0.7), *other) == [
        "instruments, audio: lost in the projection: 18.1 points (audio 88.1 %, audio_joint 70.0 %)",
        "labelled, video: gained in the projection: 3.0 points (video 50.0 %, video_joint 53.0 %; their intervals "
        "overlap)",
    ]


def test_nothing_is_said_of_one_stage_or_of_other_files() -> None:
    assert words(OWN, row("linear", "audio", 0.9)) == []
    assert words(TOWER, TEXT) == []
    for changes in ({"windows": 1}, {"count": 199}, {"by_split": {"test": 0.479}}):
        assert words(OWN, dataclasses.replace(TEXT, **changes)) == []  # type: ignore[arg-type]
