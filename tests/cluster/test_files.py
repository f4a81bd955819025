"""`cluster.files`: a file is there whole or not at all."""

import os

import pytest

from cluster.files import replacing
from pipelines.jobs.purge import _TEMP


def test_the_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path) and _TEMP.fullmatch(os.path.basename(temporary))
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_what_was_there(tmp_path, written):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        if written:
            with open(temporary, "w") as file:
                file.write("half")
        1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "a.txt") as temporary:
        open(temporary, "w")
