"""Video manifests, score tables and the audit: every layout found in the wild, identities, planted counts, mistakes.

    python -m pytest tests/test_video_tables.py
"""
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
from PIL import Image

import common
from evidence import confounding, event_audit, event_splits, rater_agreement, splitting
from readers import event_tables, event_times, file_names, score_tables, video_files

pytestmark = pytest.mark.fault("tables, COCO, JSON: quirks and mistakes")

HEADER = ("event_idx,group,day,date,start_time,end_time,duration_sec,behavior,initiator_id,receiver_id,ended_by,"
          "pen_location,linked,camera_id,video_filename,video_path,event_offset_sec").split(",")
FIGHT = Path(__file__).resolve().parents[2] / "shared" / "data" / "video" / "fight_surveillance"


def fails(function, *args, **kwargs):
    """The one-line message of the UserError that the call must raise."""
    with pytest.raises(common.UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


def put(root, *names):
    """Files with their own name as content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def event(**cells):
    """One row of an event manifest, with defaults."""
    cells = {"group": "1", "day": "1", "start_time": "6:00:00", "duration_sec": "2", "behavior": "ear",
             "initiator_id": "11", "receiver_id": "12", "camera_id": "8", "event_offset_sec": "0", **cells}
    return ",".join(str(cells.get(name, "")) for name in HEADER)


def manifest(path, *rows):
    return write(path, "\r\n".join([",".join(HEADER), *rows]) + "\r\n")


# --- paths ------------------------------------------------------------------------

def test_windows_paths_resolve_by_suffix_then_base_name_in_any_case(tmp_path):
    root = put(tmp_path / "videos", "Group 1 Day 1/Cam 8/N884_CH8_main.MP4", "Group 1 Day 1/Cam 9/n884_ch8_main.mp4",
               "elsewhere/N900.mp4", "Group 1 Day 1/Cam 8/._N884_ch8_main.mp4", ".hidden/N901.mp4")
    study = "E:\\Some study 2024\\Group 1 Day 1\\Cam 8\\"
    wanted = [study + "N884_ch8_main.mp4", study + "n900.mp4", "cam 9/N884_ch8_main", study + "N901.mp4"]
    hits, notes = file_names.match_videos(wanted, root)
    found = [path and path.relative_to(root).as_posix() for path in hits.values()]
    assert found == ["Group 1 Day 1/Cam 8/N884_CH8_main.MP4", "elsewhere/N900.mp4",
                     "Group 1 Day 1/Cam 9/n884_ch8_main.mp4", None]
    assert notes[0].startswith("2 of 4 names") and "--exact_names" in notes[0] and len(notes) == 1
    hits, notes = file_names.match_videos(wanted, root, exact=True)
    assert list(map(bool, hits.values())) == [False, False, True, False]
    assert notes[0].startswith("2 videos or folders of pictures below") and "elsewhere/N900.mp4" in notes[0]


def test_a_name_that_fits_several_files_is_an_error_that_lists_them(tmp_path):
    root = put(tmp_path, "Cam 8/a.mp4", "Cam 9/a.mp4", "Cam 9/b.mp4")
    message = fails(file_names.match_videos, ["a.mp4", "b.mp4"], root)
    assert "Cam 8/a.mp4" in message and "Cam 9/a.mp4" in message and "b.mp4 ->" not in message
    assert file_names.match_videos(["Cam 9/a.mp4"], root)[0]["Cam 9/a.mp4"] == root / "Cam 9/a.mp4"
    for wrong in (root / "gone", root / "Cam 8" / "a.mp4"):
        assert f"{wrong}: expected a folder, found no such folder" in fails(file_names.match_videos, ["a.mp4"], wrong)


def test_two_folders_of_a_manifest_never_mean_one_file(tmp_path):
    """A flat video folder with cam 8's file alone must not serve as cam 9's."""
    message = fails(file_names.match_videos, ["E:\\x\\Cam 8\\a.mp4", "E:\\x\\Cam 9\\a.mp4"], put(tmp_path, "a.mp4"))
    assert "cam 8" in message and "cam 9" in message
    assert len(file_names.match_videos(["E:\\x\\Cam 8\\a.mp4", "F:\\copy\\Cam 8\\a.mp4"], tmp_path)[0]) == 2
    moved = put(tmp_path / "other", "Cam 1/a.mp4")
    assert set(file_names.match_videos(["E:\\x\\Cam 8\\a.mp4", "F:\\copy\\Cam 8\\a.mp4"], moved)[0].values()) == {
        moved / "Cam 1/a.mp4"}


def test_a_video_that_was_converted_is_found_unless_the_original_is_there(tmp_path):
    root = put(tmp_path, "Cam 8/a.avi", "Cam 9/b.avi", "Cam 9/b.mp4")
    hits, _ = file_names.match_videos(["D:/x/Cam 8/a.mp4", "Cam 9/b.mp4"], root)
    assert list(hits.values()) == [root / "Cam 8/a.avi", root / "Cam 9/b.mp4"]


@pytest.mark.parametrize("name", ["../secret.mp4", "..\\secret.mp4", "a/../../secret.mp4", "./../videos/../secret.mp4"])
def test_paths_that_leave_the_video_root_are_missing_not_opened(tmp_path, name):
    put(tmp_path, "secret.mp4", "videos/a.mp4")
    assert file_names.match_videos([name], tmp_path / "videos")[0] == {name: None}


def test_the_file_of_another_camera_never_serves_by_its_base_name(tmp_path):
    root = put(tmp_path, "Cam 8/a.mp4")
    hits, _ = file_names.match_videos(["D:/x/Cam 8/a.mp4", "D:/x/Cam 9/a.mp4"], root)
    assert list(hits.values()) == [root / "Cam 8/a.mp4", None]


@pytest.mark.parametrize("name", ["/etc/passwd", "/../etc/passwd", "C:\\..\\..\\etc\\passwd", "//server/share/x.mp4",
                                  "http://host/x.mp4", "x\0.mp4", "."])
def test_absolute_paths_elsewhere_are_missing_not_opened(tmp_path, name):
    assert file_names.match_videos([name], put(tmp_path, "a.mp4"))[0] == {name: None}


def test_links_into_a_loop_end(tmp_path):
    put(tmp_path, "sub/a.mp4", "b.mp4")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert sorted(file_names.find_videos(tmp_path)[0]) == ["b.mp4", "sub/a.mp4"]


def test_missing_videos_are_listed_and_stop_above_the_share(tmp_path):
    put(tmp_path, *(f"v{i}.mp4" for i in range(9)))
    path = write(tmp_path / "m.csv", "path,label\n" + "".join(f"v{i}.mp4,{'ab'[i % 2]}\n" for i in range(10)))
    message = fails(event_tables.read_events, {"": path})
    assert "1 of 10" in message and "v9.mp4" in message and "--max_missing" in message
    table = event_tables.read_events({"": path}, max_missing=0.1)
    assert len(table) == 9 and [(row["row"], row["reason"]) for row in table.skipped] == [("m.csv line 11",
                                                                                          "no such video or folder")]


def test_missing_videos_name_the_folders_of_all_manifests(tmp_path):
    put(tmp_path, "r1/a.mp4", "r2/b.mp4")
    manifests = {"train": write(tmp_path / "r1/m.csv", "path,label\nx.mp4,ear\n"),
                 "val": write(tmp_path / "r2/m.csv", "path,label\nb.mp4,tail\n")}
    message = fails(event_tables.read_events, manifests)
    assert "1 of 2" in message and str(tmp_path / "r1") in message.split("x.mp4")[0]


def test_windows_far_into_a_film_keep_their_own_ids(tmp_path):
    table = windows(tmp_path, "start_frame,end_frame", "1234567,1234600", "1234569,1234600")
    assert list(table.clip_ids) == ["a.mp4@1234567-1234601f", "a.mp4@1234569-1234601f"]


def test_manifests_on_two_drives_keep_the_paths_of_their_videos(tmp_path, monkeypatch):
    def commonpath(paths):
        raise ValueError("Paths don't have the same drive")
    monkeypatch.setattr(event_tables.os.path, "commonpath", commonpath)
    sources = [tmp_path / "d" / "a.mp4", tmp_path / "e" / "a.mp4"]
    assert len(set(event_tables.paths_below_root(sources, [path.parent for path in sources]))) == 2


# --- identity of events ------------------------------------------------------------

@pytest.mark.parametrize("one, other", [
    ("6:00:25", "06:00:25"), ("6:00:25", "7/6/2024 6:00:25"), ("18:00:05", "6:00:05 PM"), ("0:30:00", "12:30 am"),
    ("06:00", "6:00:00.0")])
def test_clock_times_in_different_spellings(one, other):
    assert event_times.clock_seconds(one) == event_times.clock_seconds(other)


@pytest.mark.parametrize("one, other", [
    ("7/6/2024 0:00", "7/6/2024"), ("07/06/2024 00:00:00", "7/6/2024"), ("2024-07-06T00:00:00.000", "2024-7-6"),
    (" Calf  12 ", "calf 12"), ("007", "7"), ("7.0", "7"), ("tensor(9)", "9"), ("Group 1", "1"), ("Day 02", "2")])
def test_levels_in_different_spellings(one, other):
    assert event_tables.plain_level(one) == event_tables.plain_level(other)


def test_levels_that_differ_stay_different():
    cells = ["1", "10", "100", "1.5", "1.05", "A7", "A07", "7/6/2024", "6/7/2024", "calf 1", "calf 11", "20:00", "2:00"]
    assert len({event_tables.plain_level(cell) for cell in cells}) == len(cells)
    assert np.isnan([event_times.clock_seconds(text) for text in ("", "7", "7/6/2024", "ab:cd")]).all()


def test_the_same_event_under_another_camera_path_and_row(tmp_path):
    root = put(tmp_path / "v", "Cam 8/N884_ch8.mp4", "Cam 9/N884_ch9.mp4")
    a = manifest(tmp_path / "a.csv", event(event_idx=1, date="7/6/2024 0:00", start_time="6:50:25", receiver_id="07",
                                           video_path="E:\\s\\Cam 8\\N884_ch8.mp4", event_offset_sec=25),
                 event(event_idx=2, start_time="6:00:26", video_path="E:\\s\\Cam 8\\N884_ch8.mp4", event_offset_sec=60))
    b = manifest(tmp_path / "b.csv", event(event_idx=77, group="Group 1", start_time="06:50:25", receiver_id="7",
                                           video_path="F:/Cam 9/N884_ch9.mp4", event_offset_sec=29, camera_id=9))
    table = event_tables.read_events({"train": a, "test": b}, root)
    assert table.events[0] == table.events[2] != table.events[1]
    assert list(table.videos) == ["Cam 8/N884_ch8.mp4"] * 2 + ["Cam 9/N884_ch9.mp4"]
    assert list(table.groups) == ["1", "1", "1"] and list(table.extra["hour"]) == ["6"] * 3
    assert list(table.extra["pair"]) == ["11 > 7", "11 > 12", "11 > 7"] and list(table.parts)[1:] == ["train", "test"]
    assert "Cam" not in table.events[0] and len(set(table.clip_ids)) == 3
    text = write(tmp_path / "own.csv", b.read_text().replace("linked", "hour").replace("ended_by", "pair"))
    assert list(event_tables.read_events({"": text}, root).extra[["pair", "hour"]].iloc[0]) == ["", ""], "the table's own"


def test_without_event_columns_the_event_is_source_and_window(tmp_path):
    put(tmp_path, "x/a.mp4", "y/a.mp4")
    table = event_tables.read_events({"": write(tmp_path / "m.csv", "path,label,start_sec,end_sec\nx/a.mp4,p,0,2\n"
                                                          "x/a.mp4,p,5,7\ny/a.mp4,q,0,2\n")})
    assert list(table.events) == ["x/a.mp4@0-2", "x/a.mp4@5-7", "y/a.mp4@0-2"]


def test_rows_with_a_blank_time_are_not_one_event(tmp_path):
    root = put(tmp_path, "a.mp4")
    rows = [event(video_path="a.mp4", start_time="", event_offset_sec=t) for t in (0, 10)]
    assert len(set(event_tables.read_events({"": manifest(tmp_path / "m.csv", *rows)}, root).events)) == 2


# --- windows -----------------------------------------------------------------------

def windows(tmp_path, header, *rows, **options):
    """Table of one video with these window columns; labels a and b in turn."""
    put(tmp_path, "a.mp4")
    text = "".join(f"a.mp4,{'ab'[i % 2]},{row}\n" for i, row in enumerate(rows))
    return event_tables.read_events({"": write(tmp_path / "m.csv", f"path,label,{header}\n{text}")}, **options)


def test_offset_and_duration_with_zero_widened_around_the_event(tmp_path):
    table = windows(tmp_path, "event_offset_sec,duration_sec", "10,4", "20,0", "0.2,0", "30,", "40,0.5")
    assert table.windows.tolist() == [[10, 14], [19.5, 20.5], [0, 1], [29.5, 30.5], [39.75, 40.75]]
    assert windows(tmp_path, "event_offset_sec,duration_sec", "20,0", "30,2",
                   min_event_sec=2.0).windows.tolist() == [[19, 21], [30, 32]]


def test_start_and_end_in_seconds_or_frames(tmp_path, monkeypatch):
    assert windows(tmp_path, "start_sec,end_sec", "1.5,4", "2,9").windows.tolist() == [[1.5, 4], [2, 9]]
    table = windows(tmp_path, "start_frame,end_frame", "0,29", "60,60")
    assert list(table.unit) == ["frame", "frame"] and table.windows.tolist() == [[0, 30], [60, 61]]
    times = np.cumsum(np.tile([0.1, 0.02], 40))
    info = video_files.VideoInfo(times=times, n_frames=80, duration_sec=5.0)
    monkeypatch.setattr(video_files, "probe", lambda *_: info)
    seconds = event_times.seconds_of(table, fps=25)
    assert list(seconds.unit) == ["sec", "sec"]
    middle = (times[60] + times[61]) / 2
    np.testing.assert_allclose(seconds.windows, [[times[0], times[30]], [middle - 0.5, middle + 0.5]])


def test_impossible_windows_are_skipped_by_name(tmp_path):
    table = windows(tmp_path, "start_sec,end_sec", "1,2", "5,4", "-3,2", "2,8", ",")
    assert [row["reason"] for row in table.skipped] == ["ends before it starts", "starts before the file",
                                                        "no offset, while other rows have one"]
    assert "line 3" in table.skipped[0]["row"] and len(table) == 2
    assert "column start_sec: expected numbers or h:mm:ss, found" in fails(windows, tmp_path, "start_sec,end_sec", "1:30,2")
    assert "'0.5 s' in line 2" in fails(windows, tmp_path, "start_sec,end_sec", "0.5 s,2 s")


def test_blank_paths_are_skipped_by_their_lines(tmp_path):
    """Events that were not filmed: whatever their labels, they are no missing video and no folder."""
    put(tmp_path, "a.mp4")
    path = write(tmp_path / "m.csv", "path,label,start_sec,end_sec\na.mp4,x,1,2\n,x,3,4\n,y,5,6\n")
    for need_files in (True, False):
        table = event_tables.read_events({"": path}, need_files=need_files)
        assert list(table.lines) == ["m.csv line 2"] and not any("not there" in note for note in table.notes)
        assert [row["row"] for row in table.skipped] == ["m.csv line 3", "m.csv line 4"]
        assert {row["reason"] for row in table.skipped} == {
            "its path is blank (of merged cells the first one alone is exported: fill in the rest)"}
    write(path, "path,label\n,x\n,y\n")
    assert "no usable row of 2: m.csv line 2: its path is blank (of merged cells" in fails(event_tables.read_events, {"": path})
    path = write(tmp_path / "s.csv", "path,animal,pain\na.mp4,1,3\n,2,4\n")
    assert [row["row"] for row in score_tables.read_sequences(path).skipped] == ["s.csv line 3"]


def test_a_blank_video_path_falls_back_to_the_file_name(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    path = write(tmp_path / "m.csv", "video_path,video_filename,label\na.mp4,x.mp4,p\n,b.mp4,q\n")
    assert list(event_tables.read_events({"": path}).videos) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("header, unit", [
    ("start_frame,duration_sec", None), ("start_sec,end_frame", None), ("t_start,duration_min", "frame")])
def test_ends_in_another_unit_than_the_starts_stop(tmp_path, header, unit):
    message = fails(windows, tmp_path, header, "1,2", time_unit=unit)
    assert "both in frames or both in seconds" in message and header.split(",")[1] in message


@pytest.mark.parametrize("excel", ["", "sep=;\n"])
def test_semicolons_and_decimal_commas(tmp_path, excel):
    put(tmp_path, "a.mp4")
    path = write(tmp_path / "m.csv", excel + "Path;Label;Start Sec;End.Sec\na.mp4;x;1,5;4,25\na.mp4;y;5;6,5\n")
    assert event_tables.read_events({"": path}).windows.tolist() == [[1.5, 4.25], [5, 6.5]]


@pytest.mark.parametrize("header, cells, expected", [
    ("start,stop", "1,2.5", [1, 2.5]), ("Start (s),Stop (s)", "1,2.5", [1, 2.5]), ("onset,offset", "1,2.5", [1, 2.5]),
    ("time_start,time_end", "1,3", [1, 3]), ("start_ms,end_ms", "1000,2500", [1, 2.5]), ("BEGIN [s],End [s]", "1,3", [1, 3]),
    ("begin_time,end_time,duration", "00:00:01.500,00:01:02.750,00:01:01.250", [1.5, 62.75]),
    ("start_time,end_time", "1,2.5", [1, 2.5]), ("start_sec,end_sec", "00:00:01.500,01:00:02", [1.5, 3602]),
    ("onset_ms,offset_ms", "1000,2500", [1, 2.5]),
    ("onset_sec,dur", "2,3", [2, 5]), ("Start (min),End (min)", "1,1.5", [60, 90]), ("tStart,tEnd", "1,3", [1, 3]),
    ("Begin Time - ss.msec,End Time - ss.msec", "1.5,2.75", [1.5, 2.75]),
    ("Begin Time - hh:mm:ss.ms,End Time - hh:mm:ss.ms", "00:00:01.500,00:01:02.750", [1.5, 62.75]),
    ("Begin Time - msec,End Time - msec", "1500,2750", [1.5, 2.75]),
    ("Time offset (s),Start (s),Stop (s)", "0,1,3", [1, 3]),
    ("path_2,start,stop,length_s", "x,1,3,600", [1, 3]), ("event_offset_sec,clip_length_sec,duration_sec", "5,600,2", [5, 7]),
    ("start_sec,end_sec", "1e0,3e0", [1, 3]), ("start_sec,start_frame,end_sec", "1,25,3", [1, 3]),
    ("event_offset_sec,duration_sec,start_time,end_time", "5,2,6:00:25,6:00:27", [5, 7])])
def test_times_under_every_name_and_unit(tmp_path, header, cells, expected):
    table = windows(tmp_path, header, cells, cells)
    assert table.windows.tolist() == [expected] * 2 and set(table.unit) == {"sec"}
    is_said = any(word in header for word in ("(", "[", "_ms", "start_sec", "event_", " - "))
    assert any("--time_unit" in note for note in table.notes) != is_said


@pytest.mark.parametrize("header, unit", [("start_min,end_min", None), ("start_ms,end_ms", None), ("start,end", "ms"), ("start,end", "min")])
def test_clock_times_are_seconds_whatever_the_unit_of_the_column(tmp_path, header, unit):
    assert windows(tmp_path, header, "0:01:02,0:01:04.5", time_unit=unit).windows.tolist() == [[62, 64.5]]


@pytest.mark.parametrize("header, unit", [("start_frame,end_frame", None), ("start,end", "frame")])
def test_clock_times_are_no_frames(tmp_path, header, unit):
    message = fails(windows, tmp_path, header, "7,9", "0:01:02,0:01:03", time_unit=unit)
    assert "expected frames" in message and "0:01:02" in message and "column start" in message


@pytest.mark.parametrize("header, cells", [("Image index start,Image index stop", "10,19"), ("frame_start,frame_end", "10,19"),
                                           ("first_frame,last_frame", "10,19"), ("start_frame,duration_frames", "10,10"),
                                           ("start_sec,start_frame,end_frame", "0.4,10,19")])
def test_windows_in_frames_under_other_names(tmp_path, header, cells):
    table = windows(tmp_path, header, cells, cells)
    assert table.windows.tolist() == [[10, 20]] * 2 and set(table.unit) == {"frame"}


def test_each_row_has_the_unit_of_its_own_start_and_end(tmp_path):
    """Tables of two people joined; a start without an end in seconds does not hide the end in frames."""
    header = "start_sec,end_sec,start_frame,end_frame"
    table = windows(tmp_path, header, "1,2,,", ",,10,20", "3,5,,", "4,,100,120", "6,7,150,175", "8,,,")
    assert table.windows.tolist() == [[1, 2], [10, 21], [3, 5], [100, 121], [6, 7], [7.5, 8.5]] and not table.skipped
    assert list(table.unit) == ["sec", "frame", "sec", "frame", "sec", "sec"]


def test_the_unit_of_a_column_that_says_none_can_be_given(tmp_path):
    assert windows(tmp_path, "start,end", "60,120", time_unit="frame").windows.tolist() == [[60, 121]]
    assert windows(tmp_path, "start,end", "6000,9000", time_unit="ms").windows.tolist() == [[6, 9]]


@pytest.mark.parametrize("header, cells", [("time", "1.5"), ("timestamp,t", "1,2"), ("start_sec,timecode", "1,2"),
                                           ("end", "4"), ("recording_time", "1.5"), ("time_relative_sf", "4"), ("from,to", "1,2"), ("in", "0:01:02"),
                                           ("start_sec,stop", "1,0:00:02"), ("event_offset_sec,start_time,end_time", "1,6:00:25,6:00:27")])
def test_times_that_are_not_understood_stop(tmp_path, header, cells):
    message = fails(windows, tmp_path, header, cells, cells)
    assert "look like times" in message and header.split(",")[-1] in message and "start_sec" in message


def test_different_labels_of_one_video_without_times_stop(tmp_path):
    put(tmp_path, "a.mp4")
    path = write(tmp_path / "m.csv", "path,label,when\na.mp4,x,early\na.mp4,y,late\n")
    message = fails(event_tables.read_events, {"": path})
    assert "different labels" in message and "a.mp4" in message and "when" in message


# --- exports of other programs -----------------------------------------------------

def boris(tmp_path, text, name="b.tsv", **options):
    root = put(tmp_path / "v", "s0.mp4", "s1.mp4")
    return event_tables.read_events({"": write(tmp_path / name, text)}, root, **options)


@pytest.mark.parametrize("sep", ["\t", ","])
def test_boris_aggregated_events(tmp_path, sep):
    rows = ["Observation id;Media file;FPS;Subject;Behavior;Modifiers;Behavior type;Start (s);Stop (s);Duration (s)",
            "obs 0;D:/study/s0.mp4;25;m0;groom;;STATE;1.000;2.500;1.500",
            "obs 0;D:/study/s0.mp4;25;m0;jump;;POINT;7.000;7.000;NA",
            "obs 1;D:/study/s1.mp4;25;m1;groom;;STATE;4.000;5.500;1.500"]
    table = boris(tmp_path, "\n".join(rows).replace(";", sep) + "\n")
    assert table.windows.tolist() == [[1, 2.5], [6.5, 7.5], [4, 5.5]] and table.names == ["groom", "jump"]
    assert list(table.videos) == ["s0.mp4", "s0.mp4", "s1.mp4"] and list(table.extra["subject"]) == ["m0", "m0", "m1"]


@pytest.mark.parametrize("sep, name", [("\t", "obs 1"), (",", "obs 1"), ("\t", "s0.mp4")])
def test_boris_tabular_events_below_their_lines_of_metadata(tmp_path, sep, name):
    rows = [f"Observation id;{name};;;;;;;", ";;;;;;;;", "Media file(s);;;;;;;;", "Player #1;s0.mp4;;;;;;;",
            "Time offset (s);0.0;;;;;;;",
            "Time;Media file path;Total length;FPS;Subject;Behavior;Behavioral category;Comment;Status",
            "1.0;C:\\s0.mp4;12;25;m1;groom;;;START", "1.5;C:\\s0.mp4;12;25;m2;groom;;;START",
            "2.5;C:\\s0.mp4;12;25;m1;groom;;;STOP", "3.0;C:\\s0.mp4;12;25;m1;jump;;;POINT",
            "4.5;C:\\s0.mp4;12;25;m2;groom;;;STOP", "6.0;C:\\s0.mp4;12;25;m1;rear;;;START"]
    table = boris(tmp_path, "\n".join(rows).replace(";", sep) + "\n", min_event_sec=0)
    assert table.windows.tolist() == [[1, 2.5], [1.5, 4.5], [3, 3]]
    assert [table.names[c] for c in table.label] == ["groom", "groom", "jump"]
    assert list(table.extra["subject"]) == ["m1", "m2", "m1"]
    assert any("3 events; 1 without a STOP" in note for note in table.notes)


@pytest.mark.parametrize("total, is_read", [("10", True), ("10,1", True), ("", True), ("30", False), ("30,5", False)])
def test_a_boris_observation_that_is_longer_than_its_file_is_refused(tmp_path, monkeypatch, total, is_read):
    """Its times count on from one file to the next, also where the first file has no event or is not there."""
    lengths = {"s0.mp4": 10.0, "s1.mp4": 6.0}
    headers = {name: video_files.VideoInfo(header_sec=0.3 * length) for name, length in lengths.items()}  # may lie
    monkeypatch.setattr(video_files, "claimed", lambda path: headers[path.name])
    monkeypatch.setattr(video_files, "probe", lambda path: video_files.VideoInfo(duration_sec=lengths[path.name]))
    text = ("Observation id\tMedia file\tTotal length\tBehavior\tStart (s)\tStop (s)\n"
            f"o\ts0.mp4\t{total}\tgroom\t1\t2\no\tgone.mp4\t{total}\trear\t5\t6\n")
    if is_read:
        assert boris(tmp_path, text, max_missing=0.5).windows.tolist() == [[1, 2]]
    else:
        message = fails(boris, tmp_path, text, max_missing=0.5)
        assert "observation o: total_length 30" in message and "s0.mp4" in message
    both = text.replace("gone.mp4", "s1.mp4")  # two cameras at once, or without a length one after the other
    if total in ("10", "10,1"):
        assert len(boris(tmp_path, both)) == 2
    else:
        message = fails(boris, tmp_path, both)
        assert "an observation of its own" in message and f"total_length {total or '(blank)'}, expected" in message
    assert len(boris(tmp_path, text.replace("s0.mp4", "away.mp4"), need_files=False)) == 2


def test_a_source_whose_header_has_no_length_is_not_taken_for_one_of_several(tmp_path):
    """A broken file, whose reason is told where files are read, or a folder of frames."""
    text = "Observation id\tMedia file\tTotal length\tBehavior\tStart (s)\tStop (s)\no\ts0.mp4\t10\tgroom\t1\t2\n"
    assert boris(tmp_path, text).windows.tolist() == [[1, 2]]
    Image.new("L", (8, 8)).save(put(tmp_path / "v", "f/0.png") / "f/0.png")
    assert boris(tmp_path, text.replace("s0.mp4", "f")).windows.tolist() == [[1, 2]]


@pytest.mark.parametrize("length, is_read", [
    ("10.000|10.000", True), ("10.000|60.000", True), ("6.000;4.000", True), ("10.000;6.000|10.000;6.000", False),
    ("10,000", True), ("30,000", False)])
def test_boris_lengths_of_several_players_and_files(tmp_path, monkeypatch, length, is_read):
    """As BORIS 8 writes them: | between players at the same time, ; between files one after the other; or a spreadsheet."""
    monkeypatch.setattr(video_files, "claimed", lambda path: video_files.VideoInfo(header_sec=10.0))
    monkeypatch.setattr(video_files, "probe", lambda path: video_files.VideoInfo(duration_sec=10.0))
    text = ("Observation id\tMedia duration (s)\tMedia file name\tBehavior\tStart (s)\tStop (s)\n"
            f"o\t{length}\ts0.mp4\tgroom\t1\t2\no\t{length}\ts0.mp4\trear\t5\t6\np\t\ts1.mp4\trear\t5\t6\n")
    if is_read:
        assert boris(tmp_path, text).windows.tolist() == [[1, 2], [5, 6], [5, 6]]
    else:
        assert f"observation o: media_duration_s {length}, expected" in fails(boris, tmp_path, text)


def test_a_boris_length_that_is_no_number_is_named_with_its_line(tmp_path):
    """As a spreadsheet writes a minute; of several tables with that of its own."""
    text = "Observation id\tMedia duration (s)\tMedia file name\tBehavior\tStart (s)\tStop (s)\no\t{}\ts0.mp4\tgroom\t1\t2\n"
    put(tmp_path, "s0.mp4")
    tables = {part: write(tmp_path / f"{part}.tsv", text.format(length)) for part, length in (("train", 60), ("val", "1:00"))}
    message = fails(event_tables.read_events, tables)
    assert "column media_duration_s: expected numbers, found '1:00' in line 2 of val.tsv." in message


@pytest.mark.parametrize("header, starts, is_noted", [
    ("Start;End", ("0.000055287", "0.000101817"), True), ("Start (s);Stop (s)", ("0.1", "0.2"), False),
    ("Start;End", ("0", "0"), False), ("Start;End", ("0", "1"), False), ("Start;Duration", ("0.1", "0.2"), True)])
def test_parts_of_a_day_are_noticed(tmp_path, header, starts, is_noted):
    """A spreadsheet holds 0:00:05 as 5 / 86400; read as seconds, all events would be the first second of their file."""
    rows = [f"s{k}.mp4;{name};{start};{float(start) + 0.00005}\n" for k, (name, start) in enumerate(zip("ab", starts))]
    notes = boris(tmp_path, f"Video;Behaviour;{header}\n{''.join(rows)}").notes
    assert any("Parts of a day" in note for note in notes) is is_noted


@pytest.mark.parametrize("end, options", [(3, {}), (0.9, {"time_unit": "ms"})])
def test_events_of_short_clips_and_times_in_a_unit_that_a_flag_names_are_no_parts_of_a_day(tmp_path, end, options):
    put(tmp_path, "a.mp4", "b.mp4")
    text = f"path,label,start,end\na.mp4,walk,0,{end}\nb.mp4,eat,0.5,{end}\n"
    table = event_tables.read_events({"": write(tmp_path / "m.csv", text)}, **options)
    assert not any("Parts of a day" in note for note in table.notes)


def test_rows_of_states_and_points_with_an_end_are_not_paired(tmp_path):
    put(tmp_path, "a.mp4")
    text = "path,label,event_type,time,start_sec,end_sec\na.mp4,walk,state,9,1,3\na.mp4,peck,point,9,5,6\n"
    assert event_tables.read_events({"": write(tmp_path / "m.csv", text)}).windows.tolist() == [[1, 3], [5, 6]]


def test_columns_that_say_what_the_behaviour_is_are_no_confounds(tmp_path):
    """BORIS writes STATE or POINT, the category and the modifiers of each behaviour: known once it is."""
    table = boris(tmp_path, "Media file name,Pen,Behavior,Behavioral category,Modifier #1,Behavior type,Start (s),Stop (s)\n"
                            "s0.mp4,1,groom,self,left,STATE,1,2\ns1.mp4,2,peck,other,,POINT,5,5\n", "b.csv")
    assert list(confounding.prior_levels(table)) == ["video", "pen"]


def test_states_of_the_observer_become_events_with_start_and_end(tmp_path):
    text = ("Date_dmy;Time_Absolute_hms;Time_Relative_hmsf;Time_Relative_sf;Duration_sf;Observation;Subject;Behavior;"
            "Event_Type;Video\n"
            "1/3/2024;09:00:01;00:00:01.500;1,5;2,0;o;cow 1;groom;State start;s0.mp4\n"
            "1/3/2024;09:00:02;00:00:02.000;2,0;0,0;o;cow 2;peck;Point;s0.mp4\n"
            "1/3/2024;09:00:03;00:00:03.500;3,5;0,0;o;cow 1;groom;State stop;s0.mp4\n")
    table = boris(tmp_path, text, min_event_sec=0)
    assert table.windows.tolist() == [[1.5, 3.5], [2, 2]]
    assert [table.names[c] for c in table.label] == ["groom", "peck"]
    assert "rows START and STOP became 2 events; 0 without a STOP are left out" in table.notes


def test_starts_without_an_end_are_noted_as_points(tmp_path):
    """Ende and Duration_sf are no names that are read: the behaviours would be cut to their first second in silence."""
    said = ("b.tsv: start_s has neither an end nor a duration beside it: each event is a point in time. "
            "Call a column that says when they end end_sec or end_frame, as the start")
    text = "video;behavior;Start (s);{}\ns0.mp4;groom;1;9\n"
    for name, is_noted in (("Ende", True), ("Duration_sf", True), ("Stop (s)", False), ("Duration (s)", False)):
        assert (said in boris(tmp_path, text.format(name)).notes) is is_noted, name


def test_a_status_that_starts_and_stops_nothing_is_an_ordinary_column(tmp_path):
    table = boris(tmp_path, "video\tlabel\ttime\tstart_sec\tstatus\ns0.mp4\tgroom\t09:00\t3\tchecked\n", min_event_sec=0)
    assert table.windows.tolist() == [[3, 3]] and list(table.extra["status"]) == ["checked"] and len(table) == 1


def test_boris_events_that_are_all_points(tmp_path):
    text = ("Observation id\tMedia file path\tFPS\tBehavior\tBehavior type\tTime\n"
            "o\ts0.mp4\t25\tpeck\tPOINT\t3.5\no\ts1.mp4\t25\tjump\tPOINT\t9\n")
    assert boris(tmp_path, text).windows.tolist() == [[3, 4], [8.5, 9.5]]


def test_frames_without_a_label_are_no_events(tmp_path):
    """-1 as DeepEthogram writes it; a table of nothing else has no row to use."""
    put(tmp_path, "s0.mp4")
    path = write(tmp_path / "s0.csv", "frame,groom\n0,1\n1,0\n2,-1\n3,-1\n4,0\n")
    table = event_tables.read_events({"": path})
    assert [(table.names[c], *window) for c, window in zip(table.label, table.windows.tolist())] == [
        ("groom", 0, 1), ("background", 1, 2), ("background", 4, 5)]
    write(path, "frame,groom,rear\n0,1,0\n,1,0\n2,0,1\n")
    assert "column frame is blank in line 3" in fails(event_tables.read_events, {"": path})


@pytest.mark.parametrize("header, background", [(",background,groom,rear", "background"), ("frame,groom,rear", "background"),
                                                (",Nose_x,Nose_p,groom,rear", "background"),
                                                ("frame,speed,groom,rear", "background")])
def test_one_row_a_frame_becomes_events(tmp_path, header, background):
    """Frames 0 to 11: groom 2 to 5, rear 5 to 7, nothing 0, 1 and 8 to 11."""
    names, lines = header.split(","), []
    for frame in range(12):
        groom, rear = 2 <= frame <= 5, 5 <= frame <= 7
        cells = {"": frame, "frame": frame, "groom": int(groom), "rear": int(rear), "Nose_x": 3.5 + frame, "Nose_p": 1,
                 "speed": frame % 3,
                 "background": int(not (groom or rear))}
        lines.append(",".join(str(cells[name]) for name in names))
    root = put(tmp_path, "labels/s0_labels.csv", "v/s0.mp4")
    write(root / "labels/s0_labels.csv", "\n".join([header, *lines]) + "\n")
    for source in (root / "labels/s0_labels.csv", root / "labels"):
        table = event_tables.read_events({"": source}, root / "v")
        found = {(table.names[c], *window) for c, window in zip(table.label, table.windows.tolist())}
        assert found == {("groom", 2, 6), ("rear", 5, 8), (background, 0, 2), (background, 8, 12)}
        assert set(table.unit) == {"frame"} and set(table.videos) == {"s0.mp4"}


def test_rows_of_videos_with_a_column_of_0_and_1_are_no_rows_of_frames(tmp_path):
    """A column of paths alone makes a list; with one that numbers the frames each video has its own events."""
    put(tmp_path, "s0.mp4", "s1.mp4")
    path = write(tmp_path / "m.csv", "path,female\ns0.mp4,1\ns1.mp4,0\n")
    assert "column of labels: none" in fails(event_tables.read_events, {"": path})
    write(path, "path,frame,groom\ns0.mp4,0,1\ns0.mp4,1,1\ns1.mp4,2,0\ns1.mp4,3,1\n")
    table = event_tables.read_events({"": path})
    found = zip(table.videos, [table.names[c] for c in table.label], table.windows.tolist())
    assert list(found) == [
        ("s0.mp4", "groom", [0, 2]), ("s1.mp4", "groom", [3, 4]), ("s1.mp4", "background", [2, 3])]


@pytest.mark.parametrize("frames, expected", [
    ([0, 1, 2, 3, 10, 11], [("background", 0, 3), ("groom", 3, 4), ("groom", 10, 12)]),
    ([0, 5, 10, 15, 20, 35], [("background", 0, 11), ("groom", 15, 21), ("groom", 35, 36)]),
    ([0, 8, 16, 25, 33, 41], [("background", 0, 17), ("groom", 25, 42)]),
    ([0, 0, 1, 1, 2, 2, 3, 3], [("background", 0, 1), ("groom", 1, 4)])])  # a row for each animal
def test_an_event_does_not_go_on_over_frames_that_its_table_lacks(tmp_path, frames, expected):
    """But over the usual step of one that has every fifth frame, or three of 25."""
    put(tmp_path, "s0.mp4")
    lines = [f"{frame},{int(frame >= frames[3])}\n" for frame in frames]
    path = write(tmp_path / "s0.csv", "".join(["frame,groom\n", *lines]))
    table = event_tables.read_events({"": path})
    found = [(table.names[c], *window) for c, window in zip(table.label, table.windows.tolist())]
    assert sorted(found) == expected


def test_a_folder_of_manifests_is_one_table(tmp_path):
    root = put(tmp_path, "v/a.mp4", "v/b.mp4", "tables/one.csv", "tables/two.csv")
    write(root / "tables/one.csv", "# made by hand\nvideo_path,behavior,pen\na.mp4,ear,3\n")
    write(root / "tables/two.csv", "file,label\nb.mp4,tail\n")
    table = event_tables.read_events({"": root / "tables"}, root / "v")
    assert list(table.videos) == ["a.mp4", "b.mp4"] and table.names == ["ear", "tail"]
    assert list(table.extra["pen"]) == ["3", ""] and "one.csv: 1 line(s) above the header" in table.notes[0]


def test_a_folder_of_manifests_has_other_endings_and_hidden_files(tmp_path):
    root = put(tmp_path, "v/a.mp4", "v/b.mp4", "tables/._ONE.CSV", "tables/.ipynb_checkpoints/one.csv")
    write(root / "tables/ONE.CSV", "path,label\na.mp4,ear\n")
    write(root / "tables/two.tsv", "path\tlabel\nb.mp4\ttail\n")
    assert list(event_tables.read_events({"": root / "tables"}, root / "v").videos) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("text", ["cam 1/s0.mp4 0\ncam 1/s1.mp4 1\ncam 1/s2.mp4 0\n",
                                  "s0.mp4 0\ns1.mp4 1\ns2.mp4 0\n", "s0.mp4,0\ns1.mp4,1\ns2.mp4,0\n",
                                  "s0.mp4\t0\ns1.mp4\t1\ns2.mp4\t0\n",
                                  "s0.mp4 120 0\ns1.mp4 99 1\ns2.mp4 120 0\n", "s0 120 0\ns1 99 1\ns2 120 0\n",
                                  "cam 1/s0.mp4 120 0\ncam 1/s1.mp4 99 1\ncam 1/s2.mp4 120 0\n",
                                  "s0.mp4,120,0\ns1.mp4,99,1\ns2.mp4,120,0\n"])
def test_lists_of_path_and_label_without_a_header(tmp_path, text):
    root = put(tmp_path, *(f"v/cam 1/s{i}.mp4" for i in range(3)))
    table = event_tables.read_events({"": write(tmp_path / "list.txt", text)}, root / "v")
    assert list(table.videos) == [f"cam 1/s{i}.mp4" for i in range(3)]
    assert table.names == ["0", "1"] and table.label.tolist() == [0, 1, 0] and np.isnan(table.windows).all()
    assert "list.txt: no header line: each line is read as a path and, at its end, a label" in table.notes
    path = write(tmp_path / "list.txt", "s0.mp4,0,x\ns1.mp4,1,x\n".replace("0", "ear").replace("1,", "tail,"))
    assert "--label_column" in fails(event_tables.read_events, {"": path}, root), "which column is the label?"


def test_a_header_may_begin_with_a_comment_sign(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    table = event_tables.read_events({"": write(tmp_path / "m.csv", "#path,label,camera\na.mp4,tail,1\nb.mp4,ear,1\n")})
    assert [table.names[c] for c in table.label] == ["tail", "ear"] and list(table.extra["camera"]) == ["1", "1"]


def test_videos_without_a_row_are_named(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "c/1.png", "c/2.png", "d.npy", "notes.txt", "plot.png")
    path = write(tmp_path / "m.csv", "path,label\nb.mp4,x\n")
    [note] = event_tables.read_events({"": path}).notes
    assert note.startswith("3 videos or folders of pictures below") and note.endswith("not used: a.mp4, c, d.npy")


def test_missing_columns_are_named_and_can_be_given(tmp_path):
    root = put(tmp_path, "s0.mp4")
    path = write(tmp_path / "m.csv", "clip name,Behavior,start_sec,end_sec\ns0.mp4,groom,1,2\n")
    message = fails(event_tables.read_events, {"": path}, root)
    assert "--path_column" in message and "column of labels: behavior" in message
    assert len(event_tables.read_events({"": path}, root, path_column="Clip name")) == 1
    assert "no column for --label_column Act " in fails(
        event_tables.read_events, {"": path}, root, path_column="clip name", label_column="Act")
    path = write(tmp_path / "m.csv", "path,what\ns0.mp4,groom\n")
    assert "--label_column" in fails(event_tables.read_events, {"": path}, root)
    assert event_tables.read_events({"": path}, root, label_column="what").names == ["groom"]


def test_suffixes_decide_nothing(tmp_path):
    put(tmp_path, "a/1.ts", "b/2.h264", "b/notes.txt", "a/4.dat")
    with av.open(str(tmp_path / "b/3.cam"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    table = event_tables.read_events({"": tmp_path})
    assert sorted(table.clip_ids) == ["a/1.ts", "b/2.h264", "b/3.cam"]
    assert any("2 files in class folders are no videos: a/4.dat, b/notes.txt" in note for note in table.notes)
    path = write(tmp_path / "m.csv", "path,label\nb/3.cam,x\n1,y\n")
    assert [source.name for source in event_tables.read_events({"": path}).sources] == ["3.cam", "1.ts"]


# --- other layouts -----------------------------------------------------------------

def test_minimal_form_folders_of_frames_npy_and_whole_clips(tmp_path):
    put(tmp_path, "clips/a.mp4", "frames/seq 1/0001.jpg", "frames/seq 1/0002.jpg", "arrays/c.npy")
    path = write(tmp_path / "m.csv", "path,label,group\nclips/a.mp4,x,g1\nframes/seq 1,y,g1\narrays/c.npy,x,g2\n")
    table = event_tables.read_events({"": path})
    assert [source.name for source in table.sources] == ["a.mp4", "seq 1", "c.npy"] and np.isnan(table.windows).all()
    assert list(table.groups) == ["g1", "g1", "g2"] and list(table.clip_ids)[1] == "frames/seq 1"
    assert table.names == ["x", "y"] and list(table.label) == [0, 1, 0]


def test_seconds_of_a_source_without_a_clock_are_those_of_fps(tmp_path):
    put(tmp_path, "s1/1.jpg", "a.mp4", "c.npy")
    path = write(tmp_path / "m.csv", "path,label,start_sec,end_sec\n" + "".join(
        f"{name},{label},{label},{label + 1}\n" for name in ("s1", "a.mp4", "c.npy") for label in (1, 3)))
    table = event_times.seconds_of(event_tables.read_events({"": path}), fps=12)
    assert "times in seconds of 2 folders of frames or .npy clips" in table.notes[-1] and "12 of their" in table.notes[-1]
    assert table.windows[:2].tolist() == [[1, 2], [3, 4]]


def test_recordings_come_by_name(tmp_path, monkeypatch):
    put(tmp_path, "b.mp4", "a.mp4", "c.mp4")
    monkeypatch.setattr(file_names.os, "walk", lambda *a, **k: [(str(tmp_path), [], ["c.mp4", "a.mp4", "b.mp4"])])
    assert list(file_names.find_videos(tmp_path)[0]) == ["a.mp4", "b.mp4", "c.mp4"]


def test_class_folders_and_apple_files(tmp_path):
    put(tmp_path, "ear/1.mp4", "ear/._1.mp4", "ear/3.mp4", "tail/1.mp4", "tail/2/0.png", "tail/2/1.png", "notes.txt")
    table = event_tables.read_events({"": tmp_path})
    assert list(table.clip_ids) == ["ear/1.mp4", "tail/1.mp4", "tail/2", "ear/3.mp4"], "not sorted by class"
    assert table.names == ["ear", "tail"]
    assert len(set(table.events)) == 4, "equal base names in two class folders are two clips"
    assert "CLASS/clip.mp4" in fails(event_tables.read_events, {"": put(tmp_path / "flat", "1.mp4")})
    put(tmp_path, "NA/1.mp4")
    with pytest.raises(common.UserError, match="labels: no class can be called 'NA'"):
        event_tables.read_events({"": tmp_path})


def test_pictures_are_clips_of_one_frame(tmp_path):
    """Rows that name pictures, and class folders of nothing else; a folder of frames stays one sequence."""
    put(tmp_path, "rows/a 1.jpg", "rows/b.png", "rows/b.mp4", "folders/ear/1.jpg", "folders/tail/2.png", "folders/tail/3.jpg")
    (tmp_path / "m.csv").write_text("path,label\nrows/a 1.jpg,ear\nb.png,tail\nrows/b,tail\n")
    found = event_tables.read_events({"": tmp_path / "m.csv"}, tmp_path)
    assert [path.name for path in found.sources] == ["a 1.jpg", "b.png", "b.mp4"]
    folders = event_tables.read_events({"": tmp_path / "folders"})
    assert sorted(zip(folders.videos, folders.label)) == [("ear/1.jpg", 0), ("tail/2.png", 1), ("tail/3.jpg", 1)]
    assert any("clip of one frame" in note for note in folders.notes)


def test_absolute_paths_without_a_video_root(tmp_path):
    video = put(tmp_path / "far", "a.mp4") / "a.mp4"
    path = write(tmp_path / "m.csv", f"path,label\n{video},x\n")
    assert event_tables.read_events({"": path}).sources == [video]
    assert "1 of 1" in fails(event_tables.read_events, {"": path}, put(tmp_path / "near", "b.mp4"))
    elsewhere = write(put(tmp_path / "tables", "b.mp4") / "m.csv", path.read_text())
    assert event_tables.read_events({"": elsewhere}).sources == [video], "beside no video of its own"


def test_rows_repeated_on_purpose_are_counted_and_stand_once(tmp_path):
    root = put(tmp_path, "a.mp4", "b.mp4")
    rare = event(event_idx=1, behavior="tail", video_path="a.mp4", event_offset_sec=5)
    rows = [rare, event(video_path="b.mp4"), rare.replace("1,", "9,", 1), rare, event(video_path="b.mp4",
                                                                                    initiator_id="13")]
    table = event_tables.read_events({"train": manifest(tmp_path / "m.csv", *rows)}, root)
    assert list(table.repeats) == [3, 1, 1] and list(table.label) == [1, 0, 0] and "2 rows repeat" in table.notes[0]
    assert len(set(table.clip_ids)) == 3, "two events in one window stay two"


def test_two_behaviours_in_one_window_are_told_apart_by_their_names(tmp_path):
    path = write(put(tmp_path, "a.mp4") / "m.csv", "path,label,start_sec,end_sec\na.mp4,walk,1,3\na.mp4,eat,1,3\n")
    assert list(event_tables.read_events({"": path}).clip_ids) == ["a.mp4@1-3 [walk]", "a.mp4@1-3 [eat]"]


def test_ids_do_not_depend_on_the_order_of_the_rows(tmp_path):
    root = put(tmp_path, "a.mp4")
    rows = [event(video_path="a.mp4", initiator_id=i, behavior=label, start_time=f"6:0{t}:00", event_offset_sec=60 * t)
            for i in (3, 5) for t in range(3) for label in ("ear", "tail")]
    ids = [event_tables.read_events({"": manifest(tmp_path / "m.csv", *order)}, root).clip_ids
           for order in (rows, rows[::-1])]
    assert set(ids[0]) == set(ids[1]) and len(set(ids[0])) == 12


def test_take_keeps_all_columns_together(tmp_path):
    put(tmp_path, *(f"{name}.mp4" for name in "abcd"))
    path = write(tmp_path / "m.csv", "path,label,group\n" + "".join(f"{n}.mp4,{n},g{n}\n" for n in "abcd"))
    table = event_tables.read_events({"": path})
    for part in (table.take(np.array([3, 1])), table.take(np.array([False, True, False, True])).take([1, 0])):
        assert [source.stem for source in part.sources] == ["d", "b"] == [part.names[c] for c in part.label]
        assert list(part.groups) == list(part.extra["group"]) == ["gd", "gb"] and list(part.extra.index) == [0, 1]


# --- labels -------------------------------------------------------------------------

def test_spellings_of_case_and_spaces_are_one_class():
    names, chosen = event_tables.classes_of(["Ear", "ear", "Ear", "TAIL", "tail", ""], None, None)
    assert names == ["Ear", "TAIL"] and chosen == ["Ear"] * 3 + ["TAIL"] * 2 + [""]


@pytest.mark.parametrize("name, text", [
    ("map.json", '{"Ear": "ear", "TAIL": "tail", "tail/teat?": "tail", "tailhead": null}'),
    ("map.yaml", "Ear: ear\nTAIL: tail\ntail/teat?: tail\ntailhead:\n"),
    ("map.csv", "spelling,class\nEar,ear\nTAIL,tail\ntail/teat?,tail\ntailhead,\n"),
    ("pairs.csv", "EAR,ear\nTAIL,tail\ntail/teat?,tail\n"),
    ("wide.csv", "rows,class,spelling\n3,ear,Ear\n4,tail,TAIL\n1,tail,tail/teat?\n2,,tailhead\n"),
    ("map.yml", "ear: [Ear]\ntail: [TAIL, 'tail/teat?']\n")])
def test_label_map_in_every_format(tmp_path, name, text):
    root = put(tmp_path, "a.mp4")
    labels = ["EAR", "TAIL", "tail", "tail/teat?", *["tailhead"] * ("tailhead" in text)]
    rows = [event(video_path="a.mp4", behavior=label, event_offset_sec=10 * i) for i, label in enumerate(labels)]
    table = event_tables.read_events({"": manifest(tmp_path / "m.csv", *rows)}, root, write(tmp_path / name, text))
    assert table.names == ["ear", "tail"] and list(table.label) == [0, 1, 1, 1]
    assert [row["reason"] for row in table.skipped] == ["left out by --label_map"] * ("tailhead" in text)
    odd = write(tmp_path / "odd.csv", "spelling,klass,rows\nEar,ear,3\n")
    assert "--label_map" in (message := fails(event_tables.read_label_map, odd)) and "no column class" in message


def test_unmapped_labels_are_listed_with_their_counts(tmp_path):
    path = write(tmp_path / "map.json", '{"Ear": "ear"}')
    message = fails(event_tables.classes_of, ["ear", "tailhead", "tailhead", "x"],
                    event_tables.read_label_map(path), None)
    assert "'tailhead' (2 rows)" in message and "'x' (1 rows)" in message and "--label_map" in message
    assert "'x' (1 rows)" in fails(event_tables.classes_of, ["ear", "x"], None, ["ear", "tail"])
    assert "'b' (1 rows)" in fails(event_tables.classes_of, ["a", "b"], {"a": "ear", "b": "other"}, ["ear", "tail"])
    assert event_tables.classes_of(["TAIL"], None, ["ear", "tail"]) == (["ear", "tail"], ["tail"])
    assert event_tables.classes_of(["x"], None, ["NA", "x"]) == (["NA", "x"], ["x"]), "names of a trained model stay"


def test_blank_labels_are_skipped_in_training_and_unknown_in_prediction(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    path = write(tmp_path / "m.csv", "path,label\na.mp4,x\nb.mp4,\n")
    assert [row["reason"] for row in event_tables.read_events({"": path}).skipped] == ["no label"]
    assert list(event_tables.read_events({"": path}, names=["w", "x"], need_labels=False).label) == [1, -1]
    bare = write(tmp_path / "bare.csv", "path\na.mp4\nb.mp4\n")
    assert list(event_tables.read_events({"": bare}, names=["w", "x"], need_labels=False).label) == [-1, -1]
    assert "column of labels: none" in fails(event_tables.read_events, {"": bare})


@pytest.mark.parametrize("text, said", [
    ("movie,label\na.mp4,x\n", "column of paths"), ("path,label,Label\na.mp4,x,x\n", "differ only in spelling"),
    ("path,label\na.mp4,\n", "no usable row"), ("path,label,group\na.mp4,x,\n", "blank")])
def test_mistakes_in_a_manifest(tmp_path, text, said):
    put(tmp_path, "a.mp4")
    path = write(tmp_path / "m.csv", text)
    assert said in fails(event_tables.read_events, {"": path}, group_column="group" if "group" in text else None)
    table = {"": write(path, "path,label,pen\na.mp4,x,1\n")}
    assert "did you mean" in fails(event_tables.read_events, table, group_column="pem")


def test_groups_that_no_flag_asked_for_may_be_blank(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    table = event_tables.read_events({"": write(tmp_path / "m.csv", "path,label,group\na.mp4,x,1\nb.mp4,y,\n")})
    assert table.groups is None and "column group is blank in 1 rows and names no groups" in table.notes


# --- splits --------------------------------------------------------------------------

def small_table(tmp_path):
    """Two groups, three videos; one event is seen in videos a and b, so these two are one unit."""
    root = put(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    rows = [event(video_path="a.mp4", start_time="6:00:00"), event(video_path="b.mp4", start_time="06:00:00"),
            event(video_path="b.mp4", start_time="6:10:00", event_offset_sec=600),
            event(video_path="c.mp4", start_time="6:20:00", group="2", behavior="tail")]
    return event_tables.read_events({"": manifest(tmp_path / "m.csv", *rows)}, root)


def test_split_keys_keep_what_belongs_together(tmp_path):
    table = small_table(tmp_path)

    def units(split_by):
        return np.unique(event_tables.split_keys(table, split_by), return_inverse=True)[1].tolist()
    assert units("event") == [0, 0, 1, 2] and units("video") == [0, 0, 0, 1] and units("group") == [0, 0, 0, 1]
    assert units(None) == units("group")
    table.groups = np.array(["1"] * 4)
    assert units(None) == units("video"), "one group alone cannot be split, the next level can"
    table.groups = None
    assert "--group_column" in fails(event_tables.split_keys, table, "group")


def test_split_keys_chain_over_shared_events():
    """Independent judge: scipy's connected components of the same random links."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    draw = np.random.default_rng(0)
    columns = [draw.integers(0, 40, 60), draw.integers(0, 55, 60)]
    edges = coo_matrix((np.ones(60), (columns[0], columns[1] + 40)), shape=(95, 95))
    expected = connected_components(edges, directed=False)[1][columns[0]]
    found = np.unique(event_tables.connected([column.astype(str) for column in columns]), return_inverse=True)[1]
    assert len(set(zip(expected, found))) == len(set(expected)) == len(set(found))


# --- frame sequences with scores ---------------------------------------------------------

SCORES = ["Orbital_tightening", "Ears", "Nostril_muzzle"]


def sequences(root, n=6):
    """Folders of frames, and their records with thirds; the total of sequence 0 is 0.5 off, one score is missing."""
    put(root, *(f"calf 1/seq {i}/{k}.jpg" for i in range(n) for k in range(2)))
    records = [{"sequence_path": f"calf 1\\seq {i}", "animal": i // 2, "moment": f"M{i % 2}", "sequence_id": i,
                "num_frames": 2, **{name: (i + k) % 3 / 3 for k, name in enumerate(SCORES)},
                "NRS (1-10)": 1 + i, "VAS (0-100)": 10 * i, "Total.Facial.scale": 1.0} for i in range(n)]
    records[0]["Total.Facial.scale"], records[3]["Ears"] = 1.5, None
    return records


def check_sequences(table):
    assert table.names == [*SCORES, "NRS (1-10)", "VAS (0-100)", "Total.Facial.scale"] and len(table) == 6
    assert table.target[1, :3] == pytest.approx([1 / 3, 2 / 3, 0]) and table.target[4, 4] == 40
    assert np.argwhere(np.isnan(table.target)).tolist() == [[3, 1]]
    assert list(table.groups) == ["0", "0", "1", "1", "2", "2"] and list(table.extra["moment"]) == ["M0", "M1"] * 3
    assert [source.name for source in table.sources] == [f"seq {i}" for i in range(6)]
    [note] = table.notes
    assert f"scores by their names: {', '.join(table.names)}; other numeric columns: num_frames;" in note


def test_scores_as_csv(tmp_path):
    records = sequences(tmp_path)
    lines = [",".join(records[0]), *(",".join("" if cell is None else str(cell) for cell in row.values())
                                     for row in records)]
    check_sequences(score_tables.read_sequences(write(tmp_path / "s.csv", "\n".join(lines))))


@pytest.mark.parametrize("shape", [
    lambda records: {"sequences": records, "cv_folds": []}, lambda records: records,
    lambda records: {str(k): {name: cell for name, cell in row.items() if name != "sequence_id"}
                     for k, row in enumerate(records)},
    lambda records: {"sequences": {f"tensor({k})": row for k, row in enumerate(records)}},
    lambda records: [{**dict(list(row.items())[:5]), "scores": dict(list(row.items())[5:])} for row in records]])
def test_scores_as_json_in_every_shape(tmp_path, shape):
    path = write(tmp_path / "s.json", json.dumps(shape(sequences(tmp_path))))
    table = score_tables.read_sequences(path)
    check_sequences(table)
    assert list(table.extra["sequence_id"]) == list("012345")


@pytest.mark.parametrize("animal, total", [("Animal", "Total_Facial_scale"), ("animal_id", "total facial scale")])
def test_spellings_of_columns_and_tensor_ids(tmp_path, animal, total):
    records = [{{"animal": animal, "Total.Facial.scale": total}.get(name, name): cell for name, cell in row.items()}
               for row in sequences(tmp_path)]
    for row in records:
        row[animal] = f"tensor({row[animal] + 7})"
    table = score_tables.read_sequences(write(tmp_path / "s.json", json.dumps(records)),
                              target_columns=["orbital.tightening", "TOTAL FACIAL SCALE"])
    assert list(table.groups) == list("778899") and table.names == ["Orbital_tightening", total]
    assert table.target.shape == (6, 2) and "Ears" not in table.names


def test_raters_are_averaged_and_kept_for_the_icc(tmp_path):
    put(tmp_path, *(f"s{i}/0.jpg" for i in range(3)))
    rows = ["s0,c,A,1,4", "s0,c,B,2,6", "s1,c,A,0,", "s1,c,B,1,8", "s2,d,A,2,2"]
    table = score_tables.read_sequences(write(tmp_path / "s.csv", "path,animal,rater,ears,total\n" + "\n".join(rows)))
    assert table.target.tolist() == [[1.5, 5], [0.5, 8], [2, 2]] and list(table.repeats) == [1, 1, 1]
    ears, total = ([each[:, r] for each in table.single_ratings] for r in range(2))
    assert [each.tolist() for each in ears] == [[1, 2], [0, 1], [2]]
    assert [each[~np.isnan(each)].tolist() for each in total] == [[4, 6], [8], [2]]
    means = np.array([1.5, 0.5, 2])
    between = (np.array([2, 2, 1]) * (means - 1.2) ** 2).sum() / 2
    assert rater_agreement.icc(ears)[1] == pytest.approx((between - 0.5) / between)
    for name in ("observer", "Coder", "annotator_id"):
        agreed = write(tmp_path / "a.csv", f"path,animal,{name},ears\ns0,c,1,1\ns0,c,2,1\ns1,d,1,0\ns1,d,2,2\n")
        table = score_tables.read_sequences(agreed)
        assert table.names == ["ears"] and list(map(len, table.single_ratings)) == [2, 2], "who agree are two all the same"
    of_one = score_tables.read_sequences(tmp_path / "s.csv", row_filter="rater==B")
    assert of_one.target.tolist() == [[2, 6], [1, 8]] and of_one.single_ratings is None, "no mean with what is filtered out"
    twice = score_tables.read_sequences(write(tmp_path / "t.csv", "path,animal,ears\ns0,c,1\ns0,c,1\ns1,d,2\n"))
    assert len(twice) == 2 and twice.single_ratings is None and "3 rows of 2 sequences: 0 have several raters" in twice.notes[-1]


def test_total_and_parts_by_name_and_sum():
    names = ["Ears", "Muzzle", "NRS (1-10)", "VAS (0-100)", "Total.Facial.scale"]
    scores = np.random.default_rng(0).integers(0, 3, (20, 5)).astype(float)
    scores[:, 4] = scores[:, 0] + scores[:, 1] + np.tile([0, 0, 0, 1], 5)
    scores[3] = np.nan
    assert score_tables.total_and_parts(names, scores)[:2] == (4, [0, 1])
    assert score_tables.total_and_parts(names[:2], scores[:, :2])[:2] == (None, [])
    scores[:, 4] = np.arange(20)
    assert score_tables.total_and_parts(names, scores)[:2] == (None, []), "a name alone makes no sum"
    scores[:, 4] = scores[:, :2].sum(1) - 100
    assert score_tables.total_and_parts(names, scores)[:2] == (None, []), "nor does one that is far below"


def test_rows_of_one_sequence_that_differ_once_are_all_raters(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    text = "path,ears,mouth\na.mp4,1,2\na.mp4,1,2\na.mp4,4,2\nb.mp4,3,1\nb.mp4,3,1\n"
    table = score_tables.read_sequences(write(tmp_path / "s.csv", text))
    assert table.target.tolist() == [[2, 2], [3, 1]] and list(map(len, table.single_ratings)) == [3, 1]


def test_a_rater_who_scores_a_sequence_twice_counts_once(tmp_path):
    """As in tables of ratings of pictures: a rater agrees with himself more than with others. Blank names are nobody's."""
    put(tmp_path, *(f"{name}.mp4" for name in "bac"))
    text = "path,observer,ears,mouth\nb.mp4,A,1,2\na.mp4,A,4,4\nb.mp4,B,5,\nb.mp4,A,3,4\na.mp4,A,6,4\nc.mp4,,1,1\nc.mp4,,1,1\n"
    table = score_tables.read_sequences(write(tmp_path / "s.csv", text))
    assert [source.name for source in table.sources] == ["b.mp4", "a.mp4", "c.mp4"]
    np.testing.assert_array_equal(np.concatenate(table.single_ratings), [[2, 3], [5, np.nan], [5, 4], [1, 1], [1, 1]])
    assert list(map(len, table.single_ratings)) == [2, 1, 2] and table.target.tolist() == [[3.5, 3], [5, 4], [1, 1]]
    assert "7 rows of 3 sequences: 2 have several raters" in table.notes[-1] and "of one rater" in table.notes[-1]


def test_a_total_of_something_else_is_named(tmp_path):
    put(tmp_path, *(f"s{i}/0.jpg" for i in range(4)))
    rows = [f"s{i},{400 * i},{70 + i % 2},{38.5 + i / 10}" for i in range(4)]
    text = "path,total_activity,heart_rate,temperature\n" + "\n".join(rows)
    table = score_tables.read_sequences(write(tmp_path / "s.csv", text))
    assert "total_activity differs from the sum" in table.notes[-1] and "is not tied to it" in table.notes[-1]
    notes = score_tables.read_sequences(tmp_path / "s.csv", need_labels=False).notes
    assert not any("tied" in note for note in notes), "a trained model is what it is"


def test_columns_that_flags_name_are_no_scores(tmp_path):
    """Numbers of animals and of moments, whatever their columns are called."""
    put(tmp_path, *(f"s{i}/0.jpg" for i in range(4)))
    path = write(tmp_path / "s.csv", "path,Cow No,Time.point,pain\n" + "\n".join(f"s{i},{i // 2},{i % 2},{i}" for i in range(4)))
    table = score_tables.read_sequences(path, group_column="cow_no", moment_column="time point")
    assert table.names == ["pain"] and list(table.groups) == list("0011")
    assert list(table.extra["time_point"]) == list("0101")
    [note] = table.notes
    assert "scores by their names: pain; other numeric columns: none" in note
    path = write(tmp_path / "s.csv", path.read_text().replace("Cow No,Time.point", "Participant,Session"))
    table = score_tables.read_sequences(path)
    assert table.names == ["pain"] and list(table.groups) == list("0011"), "as their names say without a flag"
    put(tmp_path, *(f"{i}/0.jpg" for i in range(4)))
    path = write(tmp_path / "s.csv", "Video,animal,pain\n" + "\n".join(f"{i},{i // 2},{i}" for i in range(4)))
    table = score_tables.read_sequences(path)
    assert table.names == ["pain"] and [source.name for source in table.sources] == list("0123")


def test_scores_take_only_times_that_name_their_unit(tmp_path):
    """The time of day at which a sequence was filmed is no time in it."""
    put(tmp_path, "s0/0.jpg", "s1/0.jpg")
    path = write(tmp_path / "s.csv", "path,start_time,ears\ns0,06:00:25,1\ns1,06:10:00,2\n")
    table = score_tables.read_sequences(path)
    assert np.isnan(table.windows).all() and list(table.extra["hour"]) == ["6", "6"]
    assert any("start_time" in note and "start_sec" in note for note in table.notes)
    path = write(tmp_path / "s.csv", "path,start_sec,end_sec,ears\ns0,1,1.5,1\ns1,2,5,2\n")
    assert score_tables.read_sequences(path, min_event_sec=2.0).windows.tolist() == [[0.25, 2.25], [2, 5]]


@pytest.mark.parametrize("header, is_read", [("start_s,end_s", True), ("Start (s),End (s)", True), ("start,end", False)])
def test_times_of_sequences_are_no_scores(tmp_path, header, is_read):
    put(tmp_path, "s0/0.jpg", "s1/0.jpg")
    table = score_tables.read_sequences(write(tmp_path / "s.csv", f"path,{header},pain\ns0,1,3,1\ns1,2,5,2\n"))
    assert table.names == ["pain"] and np.isnan(table.windows).all() != is_read
    assert table.windows.tolist() == [[1, 3], [2, 5]] or any("start, end: not read as times" in note for note in table.notes)


def test_rows_of_one_video_are_not_independent_and_rows_of_videos_of_their_own_are(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    text = "path,label,start_sec,end_sec\na.mp4,x,0,1\nb.mp4,y,0,1\na.mp4,y,4,5\n"
    table = event_tables.read_events({"": write(tmp_path / "m.csv", text)})
    assert list(table.groups_of()) == ["a.mp4", "b.mp4", "a.mp4"]
    assert list(table.groups_of([2, 1])) == ["a.mp4", "b.mp4"]
    assert table.take([0, 1]).groups_of() is None
    table.groups = np.array(["g", "h", "g"])
    assert list(table.groups_of([1, 2])) == ["h", "g"]


def test_an_offset_without_its_onset_is_no_start(tmp_path):
    """Neither says its unit, so both are left out; the duration alone says nothing."""
    put(tmp_path, "s0/0.jpg", "s1/0.jpg")
    path = write(tmp_path / "s.csv", "path,animal,onset,offset,duration_sec,pain\ns0,a,1,3,2,1\ns1,b,2,5,3,2\n")
    table = score_tables.read_sequences(path)
    assert np.isnan(table.windows).all() and any("onset, offset: not read as times" in note for note in table.notes)
    assert any("scores by their names: pain; other numeric columns: onset, offset, duration_sec;" in note for note in table.notes)
    assert score_tables.read_sequences(path, target_columns=["duration_sec"], need_labels=False).notes[1:] == []


def test_rows_without_any_score_and_missing_folders(tmp_path):
    records = sequences(tmp_path)
    for name in [*SCORES, "NRS (1-10)", "VAS (0-100)", "Total.Facial.scale"]:
        records[2][name] = None
    records[4]["sequence_path"] = "calf 1/seq 99"
    path = write(tmp_path / "s.json", json.dumps(records))
    assert "1 of 6" in fails(score_tables.read_sequences, path) and "seq 99" in fails(score_tables.read_sequences, path)
    table = score_tables.read_sequences(path, max_missing=0.2)
    assert [row["reason"] for row in table.skipped] == ["no score", "no such video or folder"] and len(table) == 4
    assert len(score_tables.read_sequences(path, max_missing=0.2, need_labels=False)) == 5


@pytest.mark.parametrize("text, said", [("{", "expected JSON"), ("[]", "list of sequences"), ("7", "list of sequences"),
                                        ('[{"animal": 1, "ears": 1}]', "column of folders"),
                                        ('[{"path": "x", "animal": "b"}]', "columns of scores"), ("[" * 90000, "JSON"),
                                        ('[{"path": "x", "ears": 1, "Ears": 2}]', "differ only in spelling: ears, Ears"),
                                        ('[{"path": "x", "ears": 1}, "y", null]', "1 of 3 entries")])
def test_mistakes_in_a_score_file(tmp_path, text, said):
    assert said in fails(score_tables.read_sequences, write(tmp_path / "s.json", text))


# --- flags on rows -----------------------------------------------------------------------

@pytest.fixture
def scores(tmp_path):
    return score_tables.read_sequences(write(tmp_path / "s.json", json.dumps(sequences(tmp_path))))


def test_filter(scores):
    assert np.flatnonzero(event_tables.filter_rows(scores, "moment==M1")).tolist() == [1, 3, 5]
    assert np.flatnonzero(event_tables.filter_rows(scores, "Moment != 'm1' and nrs_1_10 >= 3")).tolist() == [2, 4]
    assert np.flatnonzero(event_tables.filter_rows(scores, "VAS (0-100)<20 and animal == 0")).tolist() == [0, 1]
    kept = {sign: event_tables.filter_rows(scores, f"animal {sign} 1").sum() for sign in ("<", "<=", ">", ">=", "==")}
    assert kept["<="] == kept["<"] + kept["=="] and kept[">="] == kept[">"] + kept["=="] and kept["=="] > 0
    assert "keeps none" in fails(event_tables.filter_rows, scores, "moment==M9")
    assert "did you mean moment" in fails(event_tables.filter_rows, scores, "momnet==M1")
    for hostile in ("moment", "__import__('os')", "moment==", "moment=M1", "moment==M1 and"):
        assert "--filter" in fails(event_tables.filter_rows, scores, hostile)


def test_weights_and_presets_of_levels(scores):
    assert event_tables.sample_weights(scores, ["moment:M1=2.5", "animal:2=2"]).tolist() == [1, 2.5, 1, 2.5, 2, 5]
    assert event_tables.sample_weights(scores, []).tolist() == [1] * 6
    presets = event_tables.augment_presets(scores, ["moment:m1=heavy"], "light")
    assert list(presets) == ["light", "heavy"] * 3
    assert "M0, M1" in fails(event_tables.sample_weights, scores, ["moment:M7=2"])
    assert "COLUMN:LEVEL=VALUE" in fails(event_tables.sample_weights, scores, ["moment=2"])
    assert "expected numbers" in fails(event_tables.sample_weights, scores, ["moment:M1=two"])
    assert "0 or more" in fails(event_tables.sample_weights, scores, ["moment:M1=-1"])
    assert "one of none" in fails(event_tables.augment_presets, scores, ["moment:M1=wild"], "light")


def test_test_groups(scores):
    assert np.flatnonzero(event_tables.group_mask(scores, "0, tensor(2)")).tolist() == [0, 1, 4, 5]
    assert "14" in fails(event_tables.group_mask, scores, "0,14")


def test_what_the_test_groups_leave_is_cut_into_train_and_val_by_whole_groups(scores):
    args = SimpleNamespace(folds=0, cv_file=None, test_groups="0", split_by="group", train_ratio=None, val_ratio=0.4,
                           test_ratio=0.0, seed=1)
    [split] = event_splits.asked_splits(args, scores)
    groups = {part: set(scores.groups[rows]) for part, rows in split.items()}
    assert groups["test"] == {"0"} and len(groups["train"]) == len(groups["val"]) == 1
    assert sorted(np.concatenate(list(split.values()))) == list(range(6))


def test_animals_of_flags_and_files_need_their_column(scores, tmp_path):
    scores.groups = None
    assert "--test_groups 14 needs --group_column" in fails(event_tables.group_mask, scores, "14")
    assert "it needs --group_column" in fails(score_tables.read_cv_file, tmp_path / "cv.json", scores)


FOLDS = [{"fold": 0, "train_animals": [0, 1], "val_animals": [2]},
         {"fold": 1, "train_animals": [2], "val_animals": [0]}]


@pytest.mark.parametrize("content", [
    {"cv_folds": FOLDS}, FOLDS, {"cv_folds": str(FOLDS)}, {"cv_folds": {f"fold_{k}": f for k, f in enumerate(FOLDS)}},
    {"fold_1": FOLDS[1], "fold_0": FOLDS[0], "seed": 3, "settings": {"shuffled": True}},
    {"fold_10": {"train": [2], "val": [0]}, "fold_9": {"train": [0, 1], "val": [2]}},
    {"cv_folds": str(FOLDS).replace("[2]", "[tensor(2)]")},
    {"cv_folds": str(FOLDS).replace("[2]", "[tensor(2, device='cuda:0')]")},
    {"fold_0": {"train": ["0", "1.0"], "val": ["tensor(2)"]}, "fold_1": {"train": [2], "val": ["0"]}},
    [{"train_indices": [2], "val_indices": [0, 1], **fold} for fold in FOLDS]])
def test_split_files_in_every_spelling(scores, tmp_path, content):
    folds = score_tables.read_cv_file(write(tmp_path / "cv.json", json.dumps(content)), scores)
    assert [(fold["train"].tolist(), fold["val"].tolist()) for fold in folds] == [
        ([0, 1, 2, 3], [4, 5]), ([4, 5], [0, 1])]
    assert scores.notes[-1] == "--cv_file: never judged, in val_animals of no fold: 1"


@pytest.mark.parametrize("content, said", [
    ({"cv_folds": []}, "expected cv_folds"), ({"cv_folds": "__import__('os').getcwd()"}, "cannot read"),
    ([{"train_animals": [0, 1], "val_animals": [1]}], "on both sides: 1"), ({"seed": 1}, "expected cv_folds"),
    (FOLDS + [{"train_animals": [1], "val_animals": [0, 2]}], "judged once; in several: 0, 2"),
    ([{"train_animals": [0], "val_animals": [77]}], "without rows: 77"), ([3], "expected train_animals"),
    ([{"train_ids": [0, 1], "val_ids": [2]}], "fold 0: expected train_animals or train with a list of animals, found the "
     "keys train_ids, val_ids")])
def test_mistakes_in_a_split_file(scores, tmp_path, content, said):
    assert said in fails(score_tables.read_cv_file, write(tmp_path / "cv.json", json.dumps(content)), scores)


# --- audit -----------------------------------------------------------------------------

def planted(tmp_path, seed=None):
    """Manifests with known leaks. Test shares with train: video a (rows 1, 2: 1 overlap, 1 neighbour); event at 7:00
    seen by another camera; c2.mp4, a copy of c.mp4 with the same window; group 1. Validation shares nothing."""
    root = tmp_path / "v"
    put(root, *(f"{name}.mp4" for name in "abcdefg"))
    (root / "copied").mkdir(exist_ok=True)
    (root / "copied" / "c2.mp4").write_bytes((root / "c.mp4").read_bytes())
    rows = {
        "train": [event(video_path="a.mp4", start_time="6:00:00", event_offset_sec=0, duration_sec=4),
                  event(video_path="a.mp4", start_time="6:00:02", event_offset_sec=2, duration_sec=4, behavior="tail"),
                  event(video_path="a.mp4", start_time="6:00:02", event_offset_sec=2, duration_sec=4, behavior="tail"),
                  event(video_path="b.mp4", start_time="7:00:00", event_offset_sec=50),
                  event(video_path="c.mp4", start_time="8:00:00", event_offset_sec=5),
                  event(video_path="d.mp4", start_time="8:30:00", event_offset_sec=500, behavior="tail")],
        "val": [event(video_path="e.mp4", start_time="9:00:00", group="2"),
                event(video_path="e.mp4", start_time="9:00:00", group="2", initiator_id=20, behavior="tail")],
        "test": [event(video_path="a.mp4", start_time="6:00:05", event_offset_sec=5, duration_sec=4),
                 event(video_path="f.mp4", start_time="07:00:00", event_offset_sec=9, camera_id=9),
                 event(video_path="copied/c2.mp4", start_time="8:10:00", event_offset_sec=5),
                 event(video_path="g.mp4", start_time="9:30:00", group="3", behavior="tail", event_offset_sec=9.5)]}
    for part in rows:
        order = range(len(rows[part])) if seed is None else np.random.default_rng(seed).permutation(len(rows[part]))
        manifest(tmp_path / f"{part}.csv", *(rows[part][i] for i in order))
    return event_tables.read_events({part: tmp_path / f"{part}.csv" for part in rows}, root)


def counts(found):
    return {what: item["count"] for what, item in found.items()}


def split_by_parts(table):
    return {part: np.flatnonzero(table.parts == part) for part in dict.fromkeys(table.parts)}


def audit(tmp_path, seed=None):
    def probe(source, fps):
        return SimpleNamespace(duration_sec=10.0 if source.stem == "g" else 100.0, error="", damage="")
    with mock.patch.object(video_files, "probe", probe):
        return event_audit.audit_videos(planted(tmp_path, seed), 12, positive="tail")


def test_planted_leaks_are_counted_exactly(tmp_path):
    report = audit(tmp_path)
    kinds = ("groups", "events", "videos", "renamed_copies", "exact_duplicates", "overlapping_windows", "near_windows")
    nothing = dict.fromkeys(kinds, 0)
    assert counts(report["between"]["train-val"]) == nothing == counts(report["between"]["val-test"])
    assert counts(report["between"]["train-test"]) == dict.fromkeys(kinds, 1)
    shared = report["between"]["train-test"]
    assert shared["renamed_copies"]["examples"] == ["c.mp4 = copied/c2.mp4"]
    assert report["seen_events"]["test"]["count"] == 1 and list(report["seen_events"]) == ["val", "test"]
    assert shared["exact_duplicates"]["examples"] == ["c.mp4@5-7 = copied/c2.mp4@5-7"]
    assert shared["overlapping_windows"]["examples"] == ["a.mp4@2-6 = a.mp4@5-9"]
    assert shared["near_windows"]["examples"] == ["a.mp4@0-4 = a.mp4@5-9"]


def test_planted_facts_of_each_part(tmp_path):
    report = audit(tmp_path)
    train, test = report["parts"]["train"], report["parts"]["test"]
    assert (train["rows"], train["repeated_rows"], train["events"], train["videos"]) == (5, 1, 5, 4)
    assert train["events_per_video"] == {"min": 1, "median": 1.0, "max": 2}
    assert train["classes"] == {"ear": 3, "tail": 2} and (train["groups"], test["groups"]) == (1, 2)
    assert (train["pure_videos"], train["mixed_videos"], test["pure_videos"], test["mixed_videos"]) == (3, 1, 4, 0)
    assert counts(report["within"]["train"]) == {"exact_duplicates": 0, "overlapping_windows": 1, "near_windows": 0}
    assert train["events_with_two_labels"]["count"] == 0
    assert counts(report["within"]["val"])["exact_duplicates"] == 1, "two events in the very same window"
    past = report["windows_past_the_end"]
    assert past["past"] == {"count": 1, "examples": ["d.mp4@500-502"]}
    assert past["cut"] == {"count": 1, "examples": ["g.mp4@9.5-11.5"]} and past["unknown_duration"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_the_audit_does_not_depend_on_the_order_of_the_rows(tmp_path, seed):
    one, other = (common.json_safe(audit(tmp_path, order)) for order in (None, seed))
    for report in (one, other):  # the one prior that is about the order
        report["priors"] = [row for row in report["priors"] if row["name"] != "row order"]
        report["notes"] = [note for note in report["notes"] if "row order" not in note]
    assert one == other


def test_an_audit_lists_videos_in_the_order_of_the_table(tmp_path):
    put(tmp_path, *(f"{letter}.mp4" for letter in "hgfedcba"))  # which are no videos
    path = write(tmp_path / "m.csv", "path,label\n" + "".join(f"{letter}.mp4,x\n" for letter in "hgfedcba"))
    report = event_audit.audit_videos(event_tables.read_events({"train": path}), 25)
    assert [Path(source).name[0] for source in report["unreadable"]] == list("hgfedcba")
    assert report["windows_past_the_end"]["unknown_duration"] == 8


def test_audit_text_says_it_in_ascii(tmp_path):
    text = splitting.leakage_text(audit(tmp_path))
    assert text.isascii() and "1 of 4 test events are in train or val" in text
    assert "leakage train-val: 0 groups, 0 events, 0 videos, 0 renamed copies" in text
    assert "1 renamed copy (c.mp4 = copied/c2.mp4)" in text
    assert "windows: 1 start past the end of their file (d.mp4@500-502), 1 are cut by it" in text


def test_windows_against_every_pair_of_rows(tmp_path):
    """Random windows, seconds, frames and whole clips, in three videos of which two are the same file: by brute force."""
    draw = np.random.default_rng(1)
    put(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a2.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    starts = draw.integers(0, 200, 60)
    text = "".join(f"{['a', 'b', 'a2'][i % 3]}.mp4,{'xy'[i % 2]},{s},{s + draw.integers(1, 12)}\n"
                   for i, s in enumerate(starts))
    table = event_tables.read_events({"": write(tmp_path / "m.csv", "path,label,start_sec,end_sec\n" + text)})
    table.windows[7] = np.nan
    table.unit[::5] = "frame"
    pairs = event_audit.window_pairs(table, event_audit.content_keys(table.sources), 5.0)
    overlapping, near = (set(map(frozenset, pairs[kind])) for kind in ("overlapping_windows", "near_windows"))
    expected = {"overlap": set(), "near": set()}
    bounds = [(0, 1e9) if np.isnan(window[0]) else tuple(window) for window in table.windows]
    for i in range(len(table)):
        for j in range(i):
            (a, b), (c, d) = bounds[i], bounds[j]
            same = table.sources[i].stem[0] == table.sources[j].stem[0]
            alike = table.unit[i] == table.unit[j] or 7 in (i, j)
            if same and alike and (a, b) != (c, d) and max(a, c) - min(b, d) < (5 if table.unit[i] == "sec" else 0):
                expected["overlap" if max(a, c) < min(b, d) else "near"].add(frozenset((i, j)))
    assert overlapping == expected["overlap"] and near == expected["near"] and len(near) > 5


def test_contents_are_compared_by_bytes_and_read_once(tmp_path, monkeypatch):
    put(tmp_path, "long name.mp4", "f1/0.jpg", "f1/1.jpg")
    for name, content in {"x.mp4": b"123", "y.mp4": b"124", "z.mp4": b"123"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "long name.mp4")
    names = ["x.mp4", "y.mp4", "z.mp4", "long name.mp4", "f1", "link.mp4", "gone.mp4", "lost.mp4"]
    opened, plain = [], open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: (opened.append(str(file)), plain(file, *a, **k))[1])
    keys = event_audit.content_keys([tmp_path / name for name in [*names, *names]])
    x, y, z, alone, folder, link, gone, lost = keys[:len(names)]
    assert x == z != y and alone == link != x and folder not in (x, y, alone)
    assert gone != lost and keys[len(names):].tolist() == keys[:len(names)].tolist()
    assert sorted(Path(name).name for name in opened) == ["link.mp4", "long name.mp4", "x.mp4", "y.mp4", "z.mp4"]


def test_a_table_is_audited_without_its_videos(tmp_path):
    """Every event of the test part is in train or val, and no file is there."""
    rows = {part: [event(video_path=f"{part}{i}.mp4", start_time=f"6:0{i}:00") for i in range(first, last)]
            for part, first, last in (("train", 0, 4), ("val", 4, 6), ("test", 2, 6))}
    for part in rows:
        manifest(tmp_path / f"{part}.csv", *rows[part])
    manifests = {part: tmp_path / f"{part}.csv" for part in rows}
    assert "10 of 10 videos are not below" in fails(event_tables.read_events, manifests)
    table = event_tables.read_events(manifests, need_files=False)
    assert len(table) == 10 and any("10 of 10 videos are not there: their bytes" in note for note in table.notes)
    text = splitting.leakage_text(event_audit.audit_table(table, split_by_parts(table)))
    assert "4 of 4 test events are in train or val" in text and "0 of 2 val events are in train" in text
    assert "0 exact duplicates" in text


def test_an_audit_opens_nothing_outside_the_root(tmp_path):
    put(tmp_path, "secret.mp4", "v/a.mp4")
    path = write(tmp_path / "m.csv", "path,label\n../secret.mp4,x\nE:/cam 8/a.mp4,y\n")
    table = event_tables.read_events({"": path}, tmp_path / "v", need_files=False)
    assert table.sources[1] == tmp_path / "v" / "a.mp4", "one that is there is found as ever"
    assert all((tmp_path / "v").resolve() in Path(source).resolve().parents for source in table.sources)


def test_probability_clusters(tmp_path):
    values = [0.25] * 4 + [0.5] * 3 + [0.75] * 2 + [0.1, 0.2000001, 0.2000002]
    path = write(tmp_path / "p.csv", "clip_id,prob_ear,prob_tail\n" +
                 "".join(f"c{i},{1 - p!r},{p!r}\n" for i, p in enumerate(values)))
    found = event_audit.probability_clusters(path)
    assert (found["rows"], found["distinct"], found["values"], found["rows_in_clusters"]) == (12, 5, 2, 7)
    assert found["examples"][0] == {"count": 4, "prob_ear": 0.75, "prob_tail": 0.25}
    assert "prob_CLASS" in fails(event_audit.probability_clusters, write(path, "clip_id,p\na,1\nb,2\n"))


def paired(tmp_path, n=120):
    """One class per pair of animals mostly, as calves have favourites; the camera says nothing. Train, then test."""
    draw, root = np.random.default_rng(3), put(tmp_path, *(f"v{i}.mp4" for i in range(2 * n)))
    for part in ("train", "test"):
        rows = []
        for i in range(n):
            pair = i % 6
            label = "tail" if (pair < 2) != (draw.random() < 0.1) else "ear"
            rows.append(event(video_path=f"v{i + n * (part == 'test')}.mp4", behavior=label, initiator_id=pair,
                              receiver_id=f"0{pair + 1}", start_time=f"{6 + i % 3}:{i % 60:02d}:{i // 60:02d}",
                              camera_id=i % 5, day="1" if part == "train" else "2"))
        manifest(tmp_path / f"{part}.csv", *rows)
    return event_tables.read_events({part: tmp_path / f"{part}.csv" for part in ("train", "test")}, root)


def test_the_pair_of_animals_tells_the_class_without_pixels(tmp_path, monkeypatch):
    table = paired(tmp_path)
    report = event_audit.audit_table(table, split_by_parts(table), positive="tail")
    priors = {row["name"]: row for row in report["priors"]}
    assert priors["pair"]["auc"] > 0.85 and priors["pair"]["what"] == "tail"
    assert priors["receiver_id"]["auc"] == priors["pair"]["auc"] and abs(priors["camera_id"]["auc"] - 0.5) < 0.15
    assert {"pair", "hour", "camera_id", "day", "initiator_id"} <= set(priors)
    audits = [video_files.ClipAudit(name, file_sha=f"sha {video}") for name, video in zip(table.clip_ids, table.videos)]
    first, last = (np.flatnonzero(table.parts == part)[0] for part in ("train", "test"))
    audits[last].file_sha = audits[first].file_sha
    monkeypatch.setattr(event_audit, "content_keys", None)  # a run has read its files already
    report = event_audit.audit_table(table, split_by_parts(table), audits)
    assert "priors" not in report and "no-pixel" not in splitting.leakage_text(report), "a run judges them on its folds"
    names = " = ".join(sorted([table.videos[first], table.videos[last]]))
    assert report["between"]["train-test"]["renamed_copies"] == {"count": 1, "examples": [names]}


def test_priors_across_events_and_across_groups(tmp_path):
    """Without parts: a favourite animal tells the class of its other events, and nothing of animals never seen."""
    draw, root, rows = np.random.default_rng(5), put(tmp_path, *(f"v{i}.mp4" for i in range(160))), []
    for i in range(160):
        group, pair = i % 8, i // 8 % 4
        label = "tail" if (pair == 0) != (draw.random() < 0.1) else "ear"
        rows.append(event(video_path=f"v{i}.mp4", behavior=label, group=f"{group}", initiator_id=100 * group + pair,
                          receiver_id=100 * group + 9, start_time=f"{6 + i // 60}:{i % 60:02d}:00"))
    manifest(tmp_path / "all.csv", *rows)
    table = event_tables.read_events({"": tmp_path / "all.csv"}, root)
    report = event_audit.audit_table(table, {"all": np.arange(160)}, positive="tail")
    auc = {(row["name"], row["across"]): row["auc"] for row in report["priors"]}
    assert auc["pair", "events"] > 0.75 and auc["pair", "groups"] == 0.5
    assert "no-pixel prior on pair across events: AUC of tail 0." in splitting.leakage_text(report)


@pytest.mark.parametrize("name, auc, is_told", [("pair", 0.95, True), ("pair", 0.949, False), ("row order", 1.0, False)])
def test_a_column_that_tells_the_class_is_a_warning_in_the_audit(name, auc, is_told):
    prior = {"what": "tail", "across": "parts", "name": name, "auc": auc, "low": 0.9, "high": 0.99, "subjects": 9}
    note = event_audit.prior_note(prior)
    assert note.startswith("WARNING: no-pixel prior on pair" if is_told else f"no-pixel prior on {name} across parts: AUC")


def test_rows_for_priors_go_from_train_to_test_or_into_folds(tmp_path):
    table = paired(tmp_path, 30)
    ways = confounding.judged_rows(table)
    (train,), (judged,) = ways.pop("parts")
    assert set(table.parts[train]) == {"train"} and set(table.parts[judged]) == {"test"} and not ways
    three = dataclasses.replace(table, parts=np.where(np.arange(60) % 2, table.parts, "val"))
    (train,), (judged,) = confounding.judged_rows(three)["parts"]
    assert set(three.parts[train]) == {"train"} and set(three.parts[judged]) == {"test"}
    only_train = table.take(table.parts == "train")
    for train, judged in confounding.judged_rows(only_train).values():
        assert sorted(np.concatenate(judged)) == list(range(30))
        assert len(judged) == 5 and all(not set(a) & set(b) and len(a) + len(b) == 30 for a, b in zip(train, judged))
    of_groups = [dataclasses.replace(only_train, groups=np.arange(30) % n) for n in (4, 5)]
    assert [list(confounding.judged_rows(own)) for own in of_groups] == [["events"], ["events", "groups"]]


def test_a_class_by_which_both_manifests_are_sorted_is_known_from_the_place_in_them(tmp_path):
    root = put(tmp_path, *(f"v{i}.mp4" for i in range(60)))
    for part, rows in (("train", range(40)), ("test", range(40, 60))):
        lines = [f"v{i}.mp4,{'tail' if k >= len(rows) / 2 else 'ear'}\n" for k, i in enumerate(rows)]
        write(tmp_path / f"{part}.csv", "path,label\n" + "".join(lines))
    table = event_tables.read_events({part: tmp_path / f"{part}.csv" for part in ("train", "test")}, root)
    assert {row["name"]: row["auc"] for row in confounding.no_pixel_priors(table, "tail")}["row order"] == 1


def test_priors_that_cannot_be_judged_are_left_out(tmp_path):
    """No shared estimator is called: one class in the judged part, no labels, or one unit."""
    put(tmp_path, "a.mp4", "b.mp4")
    text = {"train": "a.mp4,x\nb.mp4,y\n", "test": "a.mp4,x\nb.mp4,x\n", "": "a.mp4,x\nb.mp4,y\n"}
    for part in text:
        write(tmp_path / f"{part}.csv", "path,label\n" + text[part])
    for parts in (("train", "test"), ("",)):
        table = event_tables.read_events({part: tmp_path / f"{part}.csv" for part in parts})
        report = event_audit.audit_table(table, split_by_parts(table))
        assert report["priors"] == [] and "too few labelled" in splitting.leakage_text(report)


@pytest.mark.parametrize("groups, split_by, stops", [("aabb", None, True), ("aaaa", None, False), ("aabb", "video", False)])
def test_groups_on_two_sides_stop_a_run_that_could_keep_them_apart(tmp_path, monkeypatch, groups, split_by, stops):
    """Not a study of one animal, which says so: the column may have been named by mistake."""
    put(tmp_path, *(f"{i}.mp4" for i in range(4)))
    path = write(tmp_path / "m.csv", "path,label,pen\n" + "\n".join(f"{i}.mp4,x,{group}" for i, group in enumerate(groups)))
    table = event_tables.read_events({"": path}, group_column="pen")
    asked = SimpleNamespace(gap_sec=30, split_by=split_by, group_column="pen")
    monkeypatch.setattr(splitting, "record_split", lambda run, split, keys, report, stopping, *_: list(stopping))
    study = SimpleNamespace(table=table, audits=None)
    split = {"train": np.arange(3), "val": np.array([3])}
    stopping = event_audit.record_split(SimpleNamespace(args=asked), study, split)
    assert ("groups" in stopping) == stops
    assert ("--group_column pen has one value, a, so" in str(stopping)) == (groups == "aaaa")


@pytest.mark.parametrize("val, shared", [([2, 3], 0), ([1, 3], 2)])
def test_videos_on_two_sides_are_an_alarm(tmp_path, monkeypatch, val, shared):
    """A split by events is allowed, and says that it tells nothing of new videos."""
    put(tmp_path, "a.mp4", "b.mp4")
    path = write(tmp_path / "m.csv", "path,label,start_sec,end_sec\na.mp4,x,0,1\na.mp4,y,5,6\nb.mp4,x,0,1\nb.mp4,y,5,6\n")
    table = event_tables.read_events({"": path})
    asked = SimpleNamespace(gap_sec=30, split_by="event", group_column=None)
    monkeypatch.setattr(splitting, "record_split", lambda *_: [])
    split = {"train": np.setdiff1d(np.arange(4), val), "val": np.array(val)}
    alarms = event_audit.record_split(SimpleNamespace(args=asked), SimpleNamespace(table=table, audits=None), split)
    assert [alarm[:60] for alarm in alarms] == [
        "2 of 2 videos stand on two sides of the split, such as a.mp4"] * (shared > 0)


def test_scores_are_stratified_by_their_mean_in_sds():
    target = np.array([[0.0, 1], [100, 3], [200, np.nan]])  # their sds: 81.65 and 1
    found = event_tables.strata_of(SimpleNamespace(target=target))
    np.testing.assert_allclose(found, [0.5, (100 / 81.65 + 3) / 2, 200 / 81.65], rtol=1e-5)


def test_an_audit_of_scores_needs_no_classes(scores):
    doubled = scores.take([0, 1, 2, 3, 3, 4, 5])
    report = event_audit.audit_table(doubled, {"train": np.arange(4), "test": np.arange(4, 7)})
    found = counts(report["between"]["train-test"])
    assert found["videos"] == found["events"] == found["groups"] == 1
    assert found["exact_duplicates"] == 1
    assert "no-pixel prior on moment across parts: R2 of scores" in splitting.leakage_text(report)
    assert "leakage train-test: 1 group (" in splitting.leakage_text(report)


@pytest.mark.skipif(not FIGHT.is_dir(), reason=f"real clips are not at {FIGHT.name}")
def test_real_clips():
    table = event_tables.read_events({"": FIGHT / "clips.csv"}, group_column="scene_group")
    assert len(table) == 300 and table.names == ["fight", "noFight"] and (np.bincount(table.label) == 150).all()
    assert len(set(table.groups)) == len(set(event_tables.split_keys(table, None))) == 232 and not table.skipped
    assert len(event_tables.read_events({"": FIGHT})) == 300
