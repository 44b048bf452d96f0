"""Paths as a hostile or careless table writes them, in all three readers: refused with the row, or the right file.

    python -m pytest tests/torture/test_paths.py
"""
import os
import unicodedata

import cv2
import numpy as np
import pytest

import common
from readers import file_names, part_boxes, picture_files

GROUP = "paths: .., absolute, links, drive letters, NUL, NFC / NFD, FIFO, endless device"
NFD = unicodedata.normalize("NFD", "grün.png")


def draw(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((24, 24, 3), value, np.uint8))


@pytest.fixture
def images(tmp_path):
    """images/ok.png, images/sub/grün.png, and beside the folder secret.png, to which images/link.png leads."""
    for name in ("images/ok.png", "images/sub/grün.png", "secret.png"):
        draw(tmp_path / name)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "images"


LEAVING = ["../secret.png", "sub/../../secret.png", "..\\secret.png", "/etc/passwd", "C:\\faces\\ok.png", "e:ok.png",
           "\\\\server\\share\\ok.png", "//server/share/ok.png"]


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_mean_a_picture_inside_or_none_and_are_named(images, cases, name):
    with cases.case(GROUP):
        found, _, notes = file_names.match_images([name], images)
        assert found == {name: images / "ok.png" if name.endswith("ok.png") else None} and len(notes) == 1


@pytest.mark.parametrize("name, file", [("sub/" + NFD, "sub/grün.png"), (".\\sub\\GRÜN", "sub/grün.png"),
                                        ("{images}/ok.png", "ok.png"), ("ok\0.png", None), ("ok.png\n", "ok.png")])
def test_names_that_mean_one_file(images, cases, name, file):
    with cases.case(GROUP):
        written = name.replace("{images}", str(images))
        assert file_names.match_images([written], images)[0] == {written: file and images / file}


@pytest.mark.parametrize("kind", ["FIFO", "endless device", "dangling link", "link to itself"])
def test_what_is_no_file_is_listed_by_name_and_not_opened(images, cases, kind):
    path = images / "odd.png"
    {"FIFO": lambda: os.mkfifo(path), "endless device": lambda: path.symlink_to("/dev/zero"),
     "dangling link": lambda: path.symlink_to("nowhere.png"), "link to itself": lambda: path.symlink_to(path)}[kind]()
    with cases.case(GROUP):
        paths = file_names.find_images(images)
        audit = [picture_files.audit_image(each, 24)[0] for each in paths]
        with pytest.raises(common.UserError, match="1 of 4 pictures cannot be read") as caught:
            picture_files.check_bad_files(audit, "error")
        assert "odd.png: " in str(caught.value)


def test_a_link_out_of_the_folder_is_refused_where_a_stranger_may_have_made_it(images, cases):
    """Annotations travel with their pictures, as an archive from elsewhere does."""
    listed = images.parent / "parts.json"
    listed.write_text('{"link.png": {"parts": {}}}')
    found = part_boxes.read_annotations(listed)
    with cases.case(GROUP), pytest.raises(common.UserError, match="lead out of") as caught:
        part_boxes.find_pictures(found, images, exact_names=False)
    assert "link.png" in str(caught.value)


def test_annotations_of_other_pictures_name_the_first(images):
    listed = images.parent / "parts.json"
    listed.write_text('{"strange.png": {"parts": {}}}')
    with pytest.raises(common.UserError, match=r"none of the 1 pictures .*'strange.png'"):
        part_boxes.find_pictures(part_boxes.read_annotations(listed), images, exact_names=False)


def test_videos_never_lie_outside_their_root(tmp_path, cases):
    for name in ("videos/a.mp4", "secret.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with cases.case(GROUP):
        for name in ("../secret.mp4", "..\\secret.mp4", "a/../../secret.mp4", str(tmp_path / "secret.mp4"),
                     "C:\\..\\..\\secret.mp4", "a\0.mp4"):
            assert file_names.match_videos([name], tmp_path / "videos")[0] == {name: None}
        for name in ("D:\\study\\A.MP4", "./a.mp4"):
            assert file_names.match_videos([name], tmp_path / "videos")[0][name] == tmp_path / "videos" / "a.mp4"


def test_an_output_folder_that_is_a_file_is_refused(tmp_path, cases):
    taken = tmp_path / "outputs"
    taken.write_text("notes")
    with cases.case(GROUP), pytest.raises(common.UserError, match="cannot be written"):
        common.new_folder(taken)
    assert taken.read_text() == "notes"
