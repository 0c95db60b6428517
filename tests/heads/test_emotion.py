"""Emotion: file names by hand, folds by their speakers, completeness of the three sets, UAR against scikit-learn."""

import itertools
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, recall_score

from cmacc.clips import Listing, Manifest, MediaRecord, ScanResult
from cmacc.heads.emotion import EmotionChoice, emotion_task
from cmacc.heads.emotion_names import EmotionError, EmotionSet, Performance, performance_of
from cmacc.transfer import EvaluateOptions, TaskError, evaluate, official
from cmacc.transfer.metrics import Metric, ProtocolError
from cmacc.transfer.protocols import unweighted_recall
from cmacc.transfer.tasks import TaskData, grouped_folds

VERSIONS = (("01", ".mp4"), ("02", ".mp4"), ("01", ".wav"))
SENTENCES = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")


def write_tone(path: Path, hertz: float, seconds: float = 0.4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(int(16_000 * seconds)) / 16_000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((8_000 * np.sin(2 * np.pi * hertz * times)).astype("<i2").tobytes())


@pytest.fixture
def no_files_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan without opening a file; a name with ``broken`` in its folder is damaged, ``mute`` has no sound."""

    def scanned(listing: Listing, **_: Any) -> ScanResult:
        broken = [file for file in listing.files if "/broken/" in str(file.path)]
        records = [
            MediaRecord(
                file.path,
                3.0,
                25.0,
                320 if file.path.suffix in (".mp4", ".flv") else 0,
                240,
                "/mute/" not in str(file.path),
                16_000,
                file.label,
                file.split,
                file.group,
                content_hash=str(file.path),
            )
            for file in listing.files
            if file not in broken
        ]
        return ScanResult(Manifest(records), {}, {file.path: "is damaged" for file in broken}, listing)

    monkeypatch.setattr(official, "scan", scanned)


def touched(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ravdess_names(modality: int, channel: int, ending: str) -> list[str]:
    """Of the description on Zenodo: neutral has one intensity, actor 18 did not sing, songs have six emotions."""
    return [
        f"Actor_{actor:02d}/{modality:02d}-{channel:02d}-{emotion:02d}-{level:02d}-{statement:02d}-{take:02d}-"
        f"{actor:02d}{ending}"
        for actor in range(1, 25)
        if channel == 1 or actor != 18
        for emotion in range(1, 9 if channel == 1 else 7)
        for level in ((1,) if emotion == 1 else (1, 2))
        for statement, take in itertools.product((1, 2), (1, 2))
    ]


def crema_d_names() -> list[str]:
    """As described: twelve sentences; one of them in three levels; 20 of the 7,462 are not there."""
    emotions = ("ANG", "DIS", "FEA", "HAP", "SAD")
    of_actor = [f"{s}_{e}_XX" for s in SENTENCES if s != "IEO" for e in (*emotions, "NEU")]
    of_actor += [f"IEO_{e}_{level}" for e in emotions for level in ("LO", "MD", "HI")] + ["IEO_NEU_XX"]
    names = [f"{actor}_{name}.wav" for actor in range(1001, 1092) for name in of_actor]
    return names[20:]


def savee_names() -> list[str]:
    counts = {"a": 15, "d": 15, "f": 15, "h": 15, "n": 30, "sa": 15, "su": 15}
    return [f"{s}/{c}{i:02d}.wav" for s in ("DC", "JE", "JK", "KL") for c, n in counts.items() for i in range(1, n + 1)]


@pytest.mark.parametrize(
    ("name_of_set", "file", "said"),
    [
        ("ravdess", "Actor_12/03-01-05-01-02-01-12.wav", ("01-05-01-02-01-12", "angry", "actor 12", "speech", 0, 1)),
        ("ravdess", "01-02-06-02-02-02-23.mp4", ("02-06-02-02-02-23", "fearful", "actor 23", "song", 0, 0)),
        ("ravdess", "x/02-01-08-01-01-01-01.mp4", ("01-08-01-01-01-01", "surprised", "actor 01", "speech", 1, 0)),
        ("crema_d", "AudioWAV/1001_DFA_ANG_XX.wav", ("1001_DFA_ANG_XX", "angry", "actor 1001", "speech", 0, 0)),
        ("crema_d", "1040_ITH_SAD_X.wav", ("1040_ITH_SAD_XX", "sad", "actor 1040", "speech", 0, 0)),
        ("savee", "DC_a01.wav", ("DC_a01", "angry", "DC", "speech", 0, 0)),
        ("savee", "AudioData/KL/su15.wav", ("KL_su15", "surprised", "KL", "speech", 0, 0)),
        ("savee", "JE/n30.wav", ("JE_n30", "neutral", "JE", "speech", 0, 0)),
    ],
)
def test_what_a_name_says(name_of_set: EmotionSet, file: str, said: tuple[Any, ...]) -> None:
    assert performance_of(name_of_set, file) == Performance(*said[:4], bool(said[4]), bool(said[5]))


@pytest.mark.parametrize(
    ("name_of_set", "file", "message"),
    [
        ("ravdess", "a.wav", r"RAVDESS file a.wav: name must be MODALITY-CHANNEL-.* such as 03-01-.*, got 'a'"),
        ("ravdess", "03-01-05-01-02-01.wav", "name must be MODALITY"),
        ("ravdess", "03-01-09-01-02-01-12.wav", r"emotion must be in \[1, 8\], got 9"),
        ("ravdess", "03-01-05-01-02-01-25.wav", r"actor must be in \[1, 24\], got 25"),
        ("ravdess", "00-01-05-01-02-01-12.wav", r"modality must be in \[1, 3\], got 0"),
        ("ravdess", "03-02-07-01-02-01-12.wav", r"emotion of a song must be in \[1, 6\], got 7"),
        ("ravdess", "03-01-01-02-02-01-12.wav", r"intensity of emotion 1, neutral, must be 1, got 2"),
        ("crema_d", "1001_DFA_ANG.wav", r"CREMA-D file .*: name must be ACTOR_SENTENCE_.*, got '1001_DFA_ANG'"),
        ("crema_d", "1092_DFA_ANG_XX.wav", r"actor must be in \[1001, 1091\], got '1092'"),
        ("crema_d", "1001_ABC_ANG_XX.wav", "sentence must be one of DFA, .*, got 'ABC'"),
        ("crema_d", "1001_DFA_CAL_XX.wav", "emotion must be one of ANG, .*, got 'CAL'"),
        ("crema_d", "1001_DFA_ANG_YY.wav", "level must be one of LO, .*, got 'YY'"),
        (
            "savee",
            "DC-a01.wav",
            r"SAVEE file DC-a01.wav: name must be SPEAKER_CODE such as DC_a01, or .*, got 'DC-a01'",
        ),
        ("savee", "a01.wav", "speaker must be one of DC, JE, JK, KL, in the name or its folder, got ''"),
        ("savee", "XX_a01.wav", "speaker must be one of .*, got 'XX'"),
        ("savee", "DC_x01.wav", "emotion must be one of a, .*, got 'x'"),
        ("savee", "DC_a16.wav", r"number must be in \[1, 15\] for a, got 16"),
    ],
)
def test_a_name_that_is_not_of_the_set_is_told(name_of_set: EmotionSet, file: str, message: str) -> None:
    with pytest.raises(EmotionError, match=message):
        performance_of(name_of_set, file)


@pytest.mark.usefixtures("no_files_opened")
@pytest.mark.parametrize(
    ("name_of_set", "names", "choice", "size", "folds", "classes"),
    [
        ("ravdess", ravdess_names(3, 1, ".wav"), None, 1_440, [4] * 6, 8),
        ("ravdess", ravdess_names(3, 2, ".wav"), EmotionChoice(channels=frozenset({"song"})), 1_012, [4] * 5 + [3], 6),
        ("crema_d", crema_d_names(), None, 7_442, [18] * 4 + [19], 6),
        ("savee", savee_names(), None, 480, [1] * 4, 7),
    ],
)
def test_the_whole_sets(
    tmp_path: Path,
    name_of_set: EmotionSet,
    names: list[str],
    choice: EmotionChoice | None,
    size: int,
    folds: list[int],
    classes: int,
) -> None:
    root = touched(tmp_path, names)
    data = emotion_task(name_of_set, root, choice=choice)
    assert data.task == "emotion"
    assert not data.facts.is_partial
    assert (data.facts.files, data.facts.classes, data.modalities) == (size, classes, ("audio",))
    speakers = speakers_held_out(data)
    assert sorted(map(len, speakers)) == sorted(folds)
    assert sorted(i for split in data.splits for i in split.test) == list(range(size))
    (root / names[-1]).unlink()
    with pytest.raises(TaskError, match=rf"{name_of_set}: .* must hold all {size:,} files .*, got {size - 1:,} files"):
        emotion_task(name_of_set, root, choice=choice)


def speakers_held_out(data: TaskData) -> list[set[str]]:
    """Speakers of every fold, after checking that none of them is trained on."""
    groups = data.manifest.column("group")
    found = []
    for split in data.splits:
        train, test = ({groups[i] for i in ids} for ids in (split.train, split.test))
        assert train
        assert test
        assert not train & test
        found.append(test)
    return found


@pytest.mark.usefixtures("no_files_opened")
def test_each_performance_is_used_once_in_the_chosen_version(tmp_path: Path) -> None:
    """30 performances of each of two actors, all as film, silent film, sound, and sound of the film; and songs."""
    names = [name for name in ravdess_names(3, 1, "") if name.endswith(("-01-01", "-01-02"))]
    for name in names:
        folder, stem = name.split("/")
        touched(
            tmp_path,
            [
                *(f"{folder}/{version}{stem[2:]}{ending}" for version, ending in VERSIONS),
                *(f"copy/{stem}.mp3", f"copy/{stem}.wav"),
            ],
        )
        if stem[6:8] <= "06":
            touched(tmp_path, [f"{folder}/{stem[:3]}02{stem[5:]}.wav"])
    touched(tmp_path, ["notes/mine.wav"])
    songs_too = EmotionChoice(channels=frozenset({"speech", "song"}))
    sound = emotion_task("ravdess", tmp_path, allow_partial=True)
    films = emotion_task("ravdess", tmp_path, choice=EmotionChoice("audio_visual"), allow_partial=True)
    assert {Path(p).parts[-2] + Path(p).name[:5] + Path(p).suffix for p in sound.manifest.column("path")} == {
        "copy03-01.wav"
    }
    assert {Path(p).name[:5] + Path(p).suffix for p in films.manifest.column("path")} == {"01-01.mp4"}
    assert films.modalities == ("video", "audio")
    assert len(films.manifest) == 60
    stems = [Path(p).stem[3:] for p in sound.manifest.column("path")]
    assert (
        sorted(stems)
        == sorted({n.split("/")[1][3:] for n in names})
        == sorted(Path(p).stem[3:] for p in films.manifest.column("path"))
    )
    assert len(emotion_task("ravdess", tmp_path, choice=songs_too, allow_partial=True).manifest) == 60 + 44
    assert [Path(path).name for path in sound.skipped] == ["mine.wav"]
    assert "name must be MODALITY" in next(iter(sound.skipped.values()))


@pytest.mark.usefixtures("no_files_opened")
def test_damaged_and_mute_files_are_told(tmp_path: Path) -> None:
    names = savee_names()
    moved = [f"broken/{names[0]}", f"mute/{names[1]}", *names[2:]]
    with pytest.raises(
        TaskError, match=r"must hold all 480 .*, got 478 files of 7 classes and 4 speakers \(a01.wav: is"
    ):
        emotion_task("savee", touched(tmp_path, moved))
    data = emotion_task("savee", tmp_path, allow_partial=True)
    assert list(data.skipped.values()) == ["is damaged", "has no audio"]
    assert len(data.manifest) == data.facts.files == 478
    assert (data.facts.files_listed, data.facts.is_partial) == (480, True)
    again = emotion_task("savee", tmp_path, allow_partial=True)
    assert again.splits == data.splits
    assert again.facts == data.facts


@pytest.mark.usefixtures("no_files_opened", "users_checks")
def test_what_is_asked_for(tmp_path: Path) -> None:
    touched(tmp_path, ["DC_a01.wav"])
    with pytest.raises(EmotionError, match=r"data set must be one of ravdess, crema_d, savee, got 'iemocap'"):
        emotion_task("iemocap", tmp_path)
    with pytest.raises(
        EmotionError, match=r"ravdess: .* must hold audio files of speech, got none among 1 media files; RA"
    ):
        emotion_task("ravdess", tmp_path)
    with pytest.raises(EmotionError, match=r"must hold audio_visual files .* EmotionChoice takes the other version"):
        emotion_task("savee", tmp_path, choice=EmotionChoice("audio_visual"))
    with pytest.raises(EmotionError, match=r"savee: channels must be speech, since only ravdess has songs, got song"):
        emotion_task("savee", tmp_path, choice=EmotionChoice(channels=frozenset({"song"})))
    with pytest.raises(EmotionError, match=r"savee: .* must hold at least 2 speakers, got 1"):
        emotion_task("savee", tmp_path, allow_partial=True)
    with pytest.raises(EmotionError, match=r"EmotionChoice: channels must be speech, song or both, got none"):
        EmotionChoice(channels=frozenset())
    touched(tmp_path, savee_names())
    with pytest.raises(TaskError, match=r"task emotion: --folds must be in \[2, 4\], the number of groups, got 5"):
        emotion_task("savee", tmp_path, folds=5)


@settings(max_examples=40)
@given(st.data())
def test_no_folds_share_a_speaker(data: st.DataObject) -> None:
    """Whatever the counts of a speaker's files and emotions, and the seed; every speaker is held out once."""
    speakers = data.draw(st.integers(2, 9))
    count = data.draw(st.integers(2, min(5, speakers)))
    # Each class has at least as many files as folds: scikit-learn warns about fewer.
    pairs = [(s, e) for s in range(speakers) for e in range(3)]
    pairs += data.draw(st.lists(st.sampled_from(pairs), max_size=30))
    records = [
        MediaRecord(Path(f"/x/{i}.wav"), 1.0, 0.0, 0, 0, True, 16_000, f"e{e}", None, f"actor {s}")
        for i, (s, e) in enumerate(pairs)
    ]
    manifest = Manifest(records)
    class_of = np.asarray(manifest.label_indices(), np.int64)
    splits = grouped_folds("emotion", manifest, class_of, count, data.draw(st.integers(0, 99)))
    held_out = Counter(s for split in splits for s in {pairs[i][0] for i in split.test})
    assert held_out == dict.fromkeys(range(speakers), 1)
    for split in splits:
        assert split.test
        assert not {pairs[i][0] for i in split.train} & {pairs[i][0] for i in split.test}
        assert sorted((*split.train, *split.test)) == list(range(len(pairs)))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_uar_is_balanced_accuracy(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = np.asarray(pairs, np.int64).T
    accuracy = Metric("accuracy", (labels == predicted).astype(np.float64), 0.5)
    uar = unweighted_recall(accuracy, labels)
    present = np.unique(labels)
    expected = recall_score(labels, predicted, labels=present, average="macro", zero_division=0)
    assert uar.value == pytest.approx(expected, abs=1e-12)
    if len(present) > 1 and set(predicted) <= set(present):  # scikit-learn warns about others
        assert uar.value == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    constant = Metric("accuracy", (labels == present[0]).astype(np.float64), 0.5)
    assert unweighted_recall(constant, labels).value == pytest.approx(uar.chance) == pytest.approx(1 / len(present))


def test_uar_wants_a_label_for_each_item() -> None:
    with pytest.raises(ProtocolError, match=r"labels: must have shape \(3,\) as the items, got \(2,\)"):
        unweighted_recall(Metric("accuracy", np.ones(3), 0.5), np.zeros(2, np.int64))


def test_from_files_to_a_card(tmp_path: Path) -> None:
    """Pitch tells the emotion of most files. Of three angry ones a speaker, one sounds neutral: recalls 2/3 and 1."""
    for speaker, pitch in (("DC", 1.0), ("JE", 1.1), ("JK", 0.9), ("KL", 1.05)):
        for i in range(1, 7):
            write_tone(tmp_path / "data" / speaker / f"n{i:02d}.wav", 300 * pitch + i)
        for i in range(1, 4):
            write_tone(tmp_path / "data" / speaker / f"a{i:02d}.wav", (1_500 if i < 3 else 300) * pitch + i)
    root = tmp_path / "data"
    data = emotion_task("savee", root, allow_partial=True)
    assert data.facts.is_partial
    with pytest.raises(
        TaskError, match=r"task emotion: its data must be given as `prepared`, from `cmacc.heads.emotion"
    ):
        evaluate("statistics", ["emotion"], root, tmp_path / "out")
    options = EvaluateOptions(windows=1, workers=0, allow_partial=True)
    card = evaluate(
        "statistics",
        ["emotion"],
        root,
        tmp_path / "out",
        protocols=["linear"],
        options=options,
        prepared={"emotion": data},
    )
    found = {(row.protocol, row.metric): row for row in card.results}
    assert set(found) == {("linear", "accuracy"), ("linear", "UAR")}
    linear = found["linear", "accuracy"]
    assert linear.count == 36
    assert linear.value == pytest.approx(8 / 9)
    assert found["linear", "UAR"].value == pytest.approx((2 / 3 + 1) / 2)
    assert found["linear", "UAR"].chance == 0.5
    assert len(linear.by_split) == 4
    assert "UAR" in (tmp_path / "out" / "card.md").read_text()
