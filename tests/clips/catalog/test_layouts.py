"""Named data sets: the official lists as they are published, and files named as people's tools name them."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmacc.clips.catalog.layouts import (
    list_audioset,
    list_esc50,
    list_hmdb51,
    list_kinetics,
    list_ucf101,
    list_vggsound,
)
from cmacc.clips.catalog.listing import Listing, ListingError

ALPHABET = "abcXYZ019-_"
ids = st.text(ALPHABET, min_size=11, max_size=11)


def lay(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def segments(listing: Listing) -> dict[str, tuple[str | None, str | None, float, float | None]]:
    return {
        file.path.relative_to(file.root).as_posix(): (file.label, file.split, file.start_seconds, file.end_seconds)
        for file in listing.files
    }


def test_a_video_comes_before_the_audio_extracted_from_it(tmp_path: Path) -> None:
    csv = write(tmp_path / "train.csv", "youtube_id,time_start,time_end\n-3B32lodo2M,59,69\n")
    root = lay(tmp_path / "files", "-3B32lodo2M.aac", "-3B32lodo2M.mp4", "-3B32lodo2M.wav", "-3B32lodo2M.json")
    listing = list_kinetics(root, csv)
    assert [file.path.name for file in listing.files] == ["-3B32lodo2M.mp4"]
    assert listing.other_endings == ((".json", 1),)


# --- Kinetics ---------------------------------------------------------------------------------------------------------


def test_kinetics(tmp_path: Path) -> None:
    csv = write(
        tmp_path / "train.csv",
        "\ufefflabel,youtube_id,time_start,time_end,split,is_cc\n"
        "abseiling,-3B32lodo2M,59,69,val,0\n"
        '"air, drumming",_dbcJuKJQNs,40,50,validate,0\n'
        "zumba,a_000010_0b,10,20,train,0\n"
        "zumba,___________,0,10,test,0\n"
        "zumba,gone-gone-g,0,10,,0\n",
    )
    root = lay(
        tmp_path / "files",
        "abseiling/-3B32lodo2M_000059_000069.mp4",
        "deep/er/_dbcJuKJQNs.mkv",
        "a_000010_0b_000010_000020.webm",
        "____________000000_000010.mp4",
        "-3B32lodo2M_000000_000010.mp4",  # another segment
        "-3B32lodo2M.mp4",  # the whole video beside its cut
        "holiday.mp4",
    )
    listing = list_kinetics(root, csv)
    assert segments(listing) == {
        "abseiling/-3B32lodo2M_000059_000069.mp4": ("abseiling", "val", 0.0, None),
        "deep/er/_dbcJuKJQNs.mkv": ("air, drumming", "val", 40.0, 50.0),
        "a_000010_0b_000010_000020.webm": ("zumba", "train", 0.0, None),
        "____________000000_000010.mp4": ("zumba", "test", 0.0, None),
    }
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == (("gone-gone-g",), 3, 5)
    assert [file.path for file in listing.files] == sorted(file.path for file in listing.files)
    assert {file.group for file in listing.files} == {"-3B32lodo2M", "_dbcJuKJQNs", "a_000010_0b", "___________"}
    cut = list_kinetics(root, csv, ids_are_cut=True)
    assert segments(cut)["deep/er/_dbcJuKJQNs.mkv"] == ("air, drumming", "val", 0.0, None)


def test_kinetics_segments_of_one_video(tmp_path: Path) -> None:
    csv = write(tmp_path / "k.csv", "youtube_id,time_start,time_end\naaaaaaaaaaa,50,60\naaaaaaaaaaa,0,10\n")
    listing = list_kinetics(lay(tmp_path / "files", "aaaaaaaaaaa.mp4"), csv)
    assert [(f.start_seconds, f.end_seconds, f.label, f.split) for f in listing.files] == [
        (0.0, 10.0, None, None),
        (50.0, 60.0, None, None),
    ]
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == ((), 0, 2)


def test_a_cut_file_that_could_be_of_two_rows(tmp_path: Path) -> None:
    csv = write(tmp_path / "k.csv", "youtube_id,time_start,time_end\naaaaaaaaaaa,50,60\naaaaaaaaaaa,0,10\n")
    root = lay(tmp_path / "files", "aaaaaaaaaaa.mp4")
    message = r"k\.csv, line 3: aaaaaaaaaaa\.mp4 must tell by its name which segment .* that of k\.csv, line 2"
    with pytest.raises(ListingError, match=f"list_kinetics: {message}"):
        list_kinetics(root, csv, ids_are_cut=True)
    lay(root, "aaaaaaaaaaa_000000_000010.mp4")
    assert len(list_kinetics(root, csv, ids_are_cut=True).files) == 2


def test_a_row_that_stands_twice(tmp_path: Path) -> None:
    root = lay(tmp_path / "files", "aaaaaaaaaaa_000000_000010.mp4", "aaaaaaaaaaa.mp4")
    head = "youtube_id,time_start,time_end,label\naaaaaaaaaaa,0,10,x\n"
    listing = list_kinetics(root, write(tmp_path / "k.csv", head + "aaaaaaaaaaa,0,10,x\n"))
    assert (len(listing.files), listing.missing, listing.listed_count) == (1, (), 1)
    csv = write(tmp_path / "k.csv", head + "aaaaaaaaaaa,0,10,y\n")
    with pytest.raises(
        ListingError, match=r"k\.csv, line 3: aaaaaaaaaaa must have .*line 2, 'x' and None, got 'y' and N"
    ):
        list_kinetics(root, csv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("youtube_id,time_start\n", r"k\.csv must have the column time_end, got youtube_id, time_start"),
        ("", r"k\.csv must have the column youtube_id, got "),
        ("{head}#NAME?,0,10,train\n", r"k\.csv, line 2: youtube_id must be 11 letters, digits.*, got '#NAME\?'"),
        ("{head}aaaaaaaaaaa,x,10,train\n", r"k\.csv, line 2: time_start must be seconds >= 0, got 'x'"),
        ("{head}aaaaaaaaaaa,0,10,\naaaaaaaaaaa,0,nan,\n", r"line 3: time_end must be seconds >= 0, got 'nan'"),
        ("{head}aaaaaaaaaaa,-1,10,train\n", r"line 2: time_start must be seconds >= 0, got '-1'"),
        ("{head}aaaaaaaaaaa,10,10,train\n", r"line 2: time_end must be greater than time_start 10, got 10"),
        ("{head}aaaaaaaaaaa,0,10,dev\n", r"line 2: split must be one of train, val, .*test, got 'dev'"),
        ("{head}aaaaaaaaaaa,0\n", r"line 2: must have 4 cells, got 2"),
    ],
)
def test_kinetics_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    csv = write(tmp_path / "k.csv", text.replace("{head}", "youtube_id,time_start,time_end,split\n"))
    with pytest.raises(ListingError, match=f"list_kinetics: .*{message}"):
        list_kinetics(lay(tmp_path / "files", "a.mp4"), csv)


# --- AudioSet ---------------------------------------------------------------------------------------------------------

AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=20371, num_segs=20371, num_unique_labels=527, num_positive_labels=51804
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
--aE2O5G5WE, 0.000, 10.000, "/m/03fwl"
-0RWZT-miFs, 420.000, 430.000, "/m/03fwl"
Y_b_1_2_3_4, 5.000, 14.500, "/m/09x0r"
"""
INDICES = 'index,mid,display_name\n0,/m/09x0r,"Speech, human"\n1,/t/dd00088,Gush\n2,/m/03fwl,Goat\n'


def test_audioset(tmp_path: Path) -> None:
    csv = write(tmp_path / "balanced_train_segments.csv", AUDIOSET)
    root = lay(
        tmp_path / "files",
        "--PJHxphWEs_30.000_40.000.flac",
        "Y--aE2O5G5WE.wav",
        "x/-0RWZT-miFs_420000.wav",
        "YY_b_1_2_3_4_5000_14500.wav",
        "-0RWZT-miFs_0_10.wav",
    )
    listing = list_audioset(root, csv, write(tmp_path / "class_labels_indices.csv", INDICES))
    assert segments(listing) == {
        "--PJHxphWEs_30.000_40.000.flac": ("Speech, human;Gush", None, 0.0, None),
        "Y--aE2O5G5WE.wav": ("Goat", None, 0.0, 10.0),
        "x/-0RWZT-miFs_420000.wav": ("Goat", None, 0.0, None),
        "YY_b_1_2_3_4_5000_14500.wav": ("Speech, human", None, 0.0, None),
    }
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == ((), 1, 4)
    assert list_audioset(root, csv).files[0].label == "/m/09x0r;/t/dd00088"
    assert segments(list_audioset(root, csv, ids_are_cut=True))["Y--aE2O5G5WE.wav"][2:] == (0.0, None)


def test_audioset_bad_lists(tmp_path: Path) -> None:
    root = lay(tmp_path / "files", "a.wav")
    csv = write(tmp_path / "s.csv", AUDIOSET)
    few = write(tmp_path / "few.csv", "index,mid,display_name\n0,/m/09x0r,Speech\n")
    with pytest.raises(ListingError, match=r"s\.csv, line 4: positive_labels must be in .*few\.csv, got '/t/dd00088'"):
        list_audioset(root, csv, few)
    with pytest.raises(ListingError, match=r"list_audioset: few\.csv, line 1: must have 4 cells, got 3"):
        list_audioset(root, few)
    with pytest.raises(ListingError, match=r"s\.csv must have the column mid, got # Segments csv"):
        list_audioset(root, csv, csv)
    with pytest.raises(ListingError, match=r"list_audioset: gone\.csv must be in .*, got nothing there"):
        list_audioset(root, tmp_path / "gone.csv")
    with pytest.raises(ListingError, match=r"list_audioset: files must be in .*, got a folder"):
        list_audioset(root, root)
    (tmp_path / "latin.csv").write_bytes(b"\xe9")
    with pytest.raises(ListingError, match=r"list_audioset: .*latin\.csv: cannot be read"):
        list_audioset(root, tmp_path / "latin.csv")


# --- VGGSound ---------------------------------------------------------------------------------------------------------


def test_vggsound(tmp_path: Path) -> None:
    csv = write(
        tmp_path / "vggsound.csv",
        '---g-f_I2yQ,1,"people marching, drums",test\n--0PQM4-hqg,30,waterfall burbling,train\n'
        "--56QUhyDQM,185,playing tennis,train\n_-_-_-_-_-_,0,owl hooting,train\n-missing_-x,3,owl hooting,test\n",
    )
    root = lay(
        tmp_path / "files",
        "---g-f_I2yQ_000001.mp4",
        "--0PQM4-hqg_30.mp4",
        "--56QUhyDQM_185000_195000.mp4",
        "_-_-_-_-_-_.mp4",
        "-missing_-x_000030.mp4",
    )
    listing = list_vggsound(root, csv)
    assert segments(listing) == {
        "---g-f_I2yQ_000001.mp4": ("people marching, drums", "test", 0.0, None),
        "--0PQM4-hqg_30.mp4": ("waterfall burbling", "train", 0.0, None),
        "--56QUhyDQM_185000_195000.mp4": ("playing tennis", "train", 0.0, None),
        "_-_-_-_-_-_.mp4": ("owl hooting", "train", 0.0, 10.0),
    }
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == (("-missing_-x",), 1, 5)


def test_vggsound_bad_rows(tmp_path: Path) -> None:
    root = lay(tmp_path / "files", "a.mp4")
    for row, message in [
        ("aaaaaaaaaaa,1,owl,dev", "split must be train or test, got 'dev'"),
        ("aaaaaaaaaaa,one,owl,test", "start_seconds must be seconds >= 0, got 'one'"),
        ("aaaaaaaaaa,1,owl,test", "youtube_id must be 11 letters"),
    ]:
        with pytest.raises(ListingError, match=rf"list_vggsound: v\.csv, line 1: {message}"):
            list_vggsound(root, write(tmp_path / "v.csv", row + "\n"))


@given(
    st.dictionaries(ids, st.tuples(st.integers(0, 40_000), st.integers(0, 6)), min_size=1, max_size=6), st.booleans()
)
def test_any_id_under_any_naming(videos: dict[str, tuple[int, int]], prefixed: bool) -> None:
    """Ids that begin with or contain what parts a name's pieces, in each convention, with and without the Y."""
    namings: list[Callable[[str, int], str]] = [
        lambda i, s: i,
        lambda i, s: f"{i}_{s:06d}",
        lambda i, s: f"{i}_{s}",
        lambda i, s: f"{i}_{s * 1000}",
        lambda i, s: f"{i}_{s:06d}_{s + 10:06d}",
        lambda i, s: f"{i}_{s * 1000}_{(s + 10) * 1000}",
        lambda i, s: f"{i}_{s}.000_{s + 10}.000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        csv = write(Path(folder) / "v.csv", "".join(f"{i},{s},of {i},train\n" for i, (s, _) in videos.items()))
        names = {("Y" if prefixed else "") + namings[n](i, s) + ".mp4": (i, s, n) for i, (s, n) in videos.items()}
        listing = list_vggsound(lay(Path(folder) / "files", *names), csv)
        assert (listing.missing, listing.unmatched_count) == ((), 0)
        assert segments(listing) == {
            name: (f"of {i}", "train", *((float(s), s + 10.0) if n == 0 else (0.0, None)))
            for name, (i, s, n) in names.items()
        }


# --- UCF101 -----------------------------------------------------------------------------------------------------------


def ucf101_lists(folder: Path, train: str, test: str = "") -> Path:
    write(folder / "classInd.txt", "1 Archery\r\n2 PushUps\r\n")
    write(folder / "trainlist02.txt", train)
    write(folder / "testlist02.txt", test)
    return folder


def test_ucf101_in_other_layouts(tmp_path: Path) -> None:
    lists = ucf101_lists(
        tmp_path / "lists",
        "Archery/v_Archery_g08_c01.avi 1\r\nArchery/v_Archery_g08_c02.avi 1\r\n../Archery/v_Archery_g09_c02.avi 1\r\n",
        "PushUps/v_PushUps_g01_c01.avi\r\nPushUps/v_PushUps_g01_c02.avi\r\n",
    )
    root = lay(
        tmp_path / "files",
        "v_Archery_g08_c01.mp4",
        "UCF-101/Archery/v_Archery_g08_c02.mp4",
        "UCF-101/Archery/v_Archery_g08_c02.avi",  # the original beside its conversion: counts once, as it is listed
        "UCF-101/Archery/v_Archery_g09_c02.avi",
        "other/v_PushUps_g01_c01.webm",
    )
    (root / "v_PushUps_g01_c02.avi").symlink_to(
        lay(tmp_path / "out", "v_PushUps_g01_c02.avi") / "v_PushUps_g01_c02.avi"
    )
    listing = list_ucf101(root, lists, 2)
    assert {f.path.relative_to(root).as_posix(): (f.label, f.split, f.group) for f in listing.files} == {
        "v_Archery_g08_c01.mp4": ("Archery", "train", "Archery_g08"),
        "UCF-101/Archery/v_Archery_g08_c02.avi": ("Archery", "train", "Archery_g08"),
        "other/v_PushUps_g01_c01.webm": ("PushUps", "test", "PushUps_g01"),
    }
    assert [path for path, _ in listing.skipped] == [
        root / "v_PushUps_g01_c02.avi",
        Path("../Archery/v_Archery_g09_c02.avi"),
    ]
    assert "trainlist02.txt, line 3" in listing.skipped[1][1]
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == (
        ("PushUps/v_PushUps_g01_c02.avi",),
        2,
        5,
    )


def test_a_link_within_the_folder_makes_no_double(tmp_path: Path) -> None:
    lists = ucf101_lists(tmp_path / "lists", "Archery/v_Archery_g08_c01.avi 1\nArchery/v_Archery_g08_c02.avi 1\n")
    root = lay(tmp_path / "files", "Archery/v_Archery_g08_c01.avi", "blobs/77.avi")
    (root / "all").mkdir()
    (root / "all/v_Archery_g08_c01.avi").symlink_to("../Archery/v_Archery_g08_c01.avi")
    (root / "all/v_Archery_g08_c02.avi").symlink_to("../blobs/77.avi")
    listing = list_ucf101(root, lists, 2)
    names = [file.path.relative_to(root).as_posix() for file in listing.files]
    assert names == ["Archery/v_Archery_g08_c01.avi", "all/v_Archery_g08_c02.avi"]
    assert (listing.unmatched_count, listing.skipped) == (0, ())


def test_ucf101_bad_lists(tmp_path: Path) -> None:
    root, lists = lay(tmp_path / "files", "a.avi"), tmp_path / "lists"
    for train, message in [
        ("Archery/v_Archery_g08_c01.avi 2\n", "line 1: index of Archery must be 1 as in classInd.txt, got '2'"),
        (
            "\nNoClass/v_Archery_g08_c01.avi 1\n",
            "line 2: must be Class/name with a class of classInd.txt, got 'NoClass",
        ),
        ("Archery/holiday.avi 1\n", "line 1: name must end in _gNN_cNN, got 'Archery/holiday.avi'"),
    ]:
        with pytest.raises(ListingError, match=rf"list_ucf101: trainlist02\.txt, {message}"):
            list_ucf101(root, ucf101_lists(lists, train), 2)
    with pytest.raises(ListingError, match=r"list_ucf101: trainlist03\.txt must be in .*lists, got nothing there"):
        list_ucf101(root, lists, 3)
    with pytest.raises(ListingError, match=r"list_ucf101: split must be one of 1, 2, 3, got 4"):
        list_ucf101(root, lists, 4)
    with pytest.raises(ListingError, match=r"list_ucf101: classInd\.txt must be in .*files, got nothing there"):
        list_ucf101(root, root, 1)
    write(lists / "classInd.txt", "Archery\n")
    with pytest.raises(ListingError, match=r"classInd\.txt, line 1: must be an index and a class, got 'Archery'"):
        list_ucf101(root, lists, 2)
    for folder, message in [(tmp_path / "gone", "must be a folder, got nothing"), (lists, "no media file under")]:
        with pytest.raises(ListingError, match=f"list_ucf101: .*{message}"):
            list_ucf101(folder, lists, 2)


@pytest.fixture(scope="module")
def all_of_ucf101(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lists = [real_data / f"splits/ucf101/{part}list01.txt" for part in ("train", "test")]
    rows = [row for path in lists for row in path.read_text().splitlines()]
    return lay(tmp_path_factory.mktemp("ucf101"), *(row.split()[0] for row in rows))


# Without the checks of every call's types, which would take most of the time of 13,320 rows.
@pytest.mark.usefixtures("users_checks")
@pytest.mark.real_data
@pytest.mark.parametrize(("split", "train", "test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_ucf101_official_lists(real_data: Path, all_of_ucf101: Path, split: int, train: int, test: int) -> None:
    listing = list_ucf101(all_of_ucf101, real_data / "splits/ucf101", split)
    assert Counter(file.split for file in listing.files) == {"train": train, "test": test}
    assert (listing.listed_count, listing.missing, listing.unmatched_count) == (train + test, (), 0)
    assert len({file.label for file in listing.files}) == 101
    assert all(file.path.parent.name == file.label for file in listing.files)
    splits_of = defaultdict(set)
    for file in listing.files:
        splits_of[file.group].add(file.split)
    assert len(splits_of) == 101 * 25
    assert all(len(splits) == 1 for splits in splits_of.values())


@pytest.mark.usefixtures("users_checks")
@pytest.mark.real_data
def test_ucf101_real_folders(real_data: Path) -> None:
    lists = real_data / "splits/ucf101"
    listing = list_ucf101(real_data / "ucf101", lists, 1)
    assert (len(listing.files), len(listing.missing), listing.unmatched_count) == (792, 13_320 - 792, 0)
    assert len({file.label for file in listing.files}) == 6
    assert "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi" in listing.missing
    listing = list_ucf101(real_data / "ucf101_original", lists, 3)
    assert (len(listing.files), {file.path.suffix for file in listing.files}) == (30, {".avi"})


# --- HMDB51 -----------------------------------------------------------------------------------------------------------


def test_hmdb51_names(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    odd = ["#20_Rhythm_clap_u_nm_np1_fr_goo_0", "A&B!(x)_clap_u", "Jágerin clap", "a.b.c_clap"]
    write(lists / "clap_test_split1.txt", "".join(f"{name}.avi {n % 3} \n" for n, name in enumerate(odd)))
    root = lay(
        tmp_path / "files", *(f"clap/{name}.mp4" for name in odd[:2]), "Ja\u0301gerin clap.avi", "a.b.c_clap.avi"
    )
    listing = list_hmdb51(root, lists, 1)
    assert (listing.missing, listing.unmatched_count, len(listing.files)) == ((), 0, 4)
    split_of = {file.path.name[:3]: file.split for file in listing.files}
    assert split_of == {"#20": "unused", "A&B": "train", "Ja\u0301": "test", "a.b": "unused"}
    assert {(file.label, file.group) for file in listing.files} == {("clap", None)}


def test_hmdb51_bad_lists(tmp_path: Path) -> None:
    root, lists = lay(tmp_path / "files", "a.avi"), tmp_path / "lists"
    for row in ("a.avi 3 ", "a.avi", "a.avi one"):
        write(lists / "clap_test_split1.txt", f"b.avi 1 \n{row}\n")
        with pytest.raises(
            ListingError, match=r"list_hmdb51: clap_test_split1\.txt, line 2: must be a name and 0, 1 or 2"
        ):
            list_hmdb51(root, lists, 1)
    with pytest.raises(ListingError, match=r"list_hmdb51: \*_test_split2\.txt must be in .*lists, got nothing there"):
        list_hmdb51(root, lists, 2)
    with pytest.raises(ListingError, match=r"list_hmdb51: split must be one of 1, 2, 3, got 0"):
        list_hmdb51(root, lists, 0)


@pytest.fixture(scope="module")
def all_of_hmdb51(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = []
    for path in (real_data / "splits/hmdb51/testTrainMulti_7030_splits").glob("*_split1.txt"):
        label = path.name.removesuffix("_test_split1.txt")
        names += [f"{label}/{line.split()[0]}" for line in path.read_text().splitlines()]
    return lay(tmp_path_factory.mktemp("hmdb51"), *names)


@pytest.mark.usefixtures("users_checks")
@pytest.mark.real_data
@pytest.mark.parametrize("split", [1, 2, 3])
def test_hmdb51_official_lists(real_data: Path, all_of_hmdb51: Path, split: int) -> None:
    listing = list_hmdb51(all_of_hmdb51, real_data / "splits/hmdb51/testTrainMulti_7030_splits", split)
    assert (listing.missing, listing.unmatched_count, listing.listed_count) == ((), 0, 6766)
    assert Counter(file.split for file in listing.files) == {"train": 3570, "test": 1530, "unused": 1666}
    for part, count in (("train", 70), ("test", 30)):
        assert set(Counter(file.label for file in listing.files if file.split == part).values()) == {count}
    assert all(file.path.parent.name == file.label for file in listing.files)


# --- ESC-50 -----------------------------------------------------------------------------------------------------------


CROSSING = {2: {"131943", "134049"}, 3: {"131943", "134049"}, 4: {"209698", "234879"}, 5: {"209698", "234879"}}


@pytest.mark.usefixtures("users_checks")
@pytest.mark.real_data
@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_esc50_official_folds(real_data: Path, tmp_path: Path, fold: int) -> None:
    root, meta = real_data / "esc50", real_data / "esc50/meta/esc50.csv"
    here = list_esc50(root, meta, fold)
    assert (len(here.files), len(here.missing), here.unmatched_count, here.listed_count) == (731, 1269, 0, 2000)
    ten = list_esc50(root, meta, fold, only_esc10=True)
    assert (len(ten.files), ten.missing, ten.unmatched_count, ten.listed_count) == (400, (), 331, 400)
    assert Counter(file.split for file in ten.files) == {"train": 320, "test": 80}
    assert set(Counter(file.label for file in ten.files).values()) == {40}
    assert all(file.path.name.startswith(f"{fold}-") == (file.split == "test") for file in here.files)
    names = [line.split(",")[0] for line in meta.read_text().splitlines()[1:]]
    full = list_esc50(lay(tmp_path, *(f"audio/{name}" for name in names)), meta, fold)
    assert Counter(file.split for file in full.files) == {"train": 1600, "test": 400}
    assert full.missing == ()
    train, test = ({file.group for file in full.files if file.split == part} for part in ("train", "test"))
    # So the set was published: four recordings with two animals or two clocks lie in two folds each.
    assert train & test == CROSSING.get(fold, set())
    train, test = ({file.group for file in ten.files if file.split == part} for part in ("train", "test"))
    assert not train & test


def test_esc50_bad_lists(tmp_path: Path) -> None:
    root, head = lay(tmp_path / "files", "1-1-A-0.wav"), "filename,fold,category,esc10,src_file\n"
    for text, message in [
        (f"{head}1-1-A-0.wav,6,dog,True,1\n", "line 2: fold must be 1 to 5, got '6'"),
        (f"{head}1-1-A-0.wav,1,dog,yes,1\n", "line 2: esc10 must be True or False, got 'yes'"),
        ("filename,fold\n", "must have the column category, got filename, fold"),
    ]:
        with pytest.raises(ListingError, match=rf"list_esc50: esc50\.csv,? {message}"):
            list_esc50(root, write(tmp_path / "esc50.csv", text), 1)
    with pytest.raises(ListingError, match=r"list_esc50: fold must be one of 1, 2, 3, 4, 5, got 6"):
        list_esc50(root, tmp_path / "esc50.csv", 6)
    listing = list_esc50(root, write(tmp_path / "esc50.csv", f"{head}../1-1-A-0.wav,1,dog,True,1\n"), 1)
    assert (listing.files, listing.unmatched_count, listing.skipped[0][0]) == ((), 1, Path("../1-1-A-0.wav"))
