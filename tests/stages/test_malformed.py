"""Archives with many bad files: one row an input, every reason typed, memory bounded, no exception.

Size by environment: SCOL_FUZZ_INPUTS (default 300), SCOL_FUZZ_BAD (default 190), SCOL_FUZZ_SEED (default 0). The long
tests have 2000 inputs, 500 of them bad.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipelines.archive.paths import SourceError
from pipelines.photos.photo import PhotoError
from tests.helpers.malformed import MAX_PIXELS, make_archive

ROOT = Path(__file__).parents[2]
DOCUMENTED = {*PhotoError.CODES, *re.findall(r"[A-Z][A-Z0-9_]{4,}", SourceError.__doc__), "TOO_MANY_FACES", "GEOMETRY"}
INPUTS, BAD, SEED = (
    int(os.environ.get(f"SCOL_FUZZ_{name}", default)) for name, default in (("INPUTS", 300), ("BAD", 190), ("SEED", 0))
)


@pytest.mark.parametrize(("inputs", "bad"), [(INPUTS, BAD), pytest.param(2000, 500, marks=pytest.mark.long)])
def test_an_archive_of_bad_files_has_a_typed_row_for_each(tmp_path, draw_photo, record_property, inputs, bad):
    made = make_archive(tmp_path, SEED, inputs, bad, [draw_photo([5], 300, 280)])
    # A process of its own: its memory is that of this work alone, and a crash of a decoder is told by its status.
    child = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/helpers/malformed.py"), "check", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    told = json.loads(child.stdout)
    paths = {f"archive/{entry.path}": entry for entry in made}
    assert len(paths) == inputs and told["listed"] == sorted(paths)

    # The folder has a row for whatever is not itself a folder.
    no_folders = sorted(entry.path for entry in made if entry.kind not in ("folder", "full_folder"))
    assert told["in_folder"] == no_folders

    rows = Counter(row["path"] for row in told["rows"])
    assert set(rows) == set(paths), "every input has a row"
    keys = [(row["photo_id"], row["face_id"]) for row in told["rows"]]
    assert len(keys) == len(set(keys)), "and no row is doubled"
    wrong = []
    for row in told["rows"]:
        entry = paths[row["path"]]
        if row["status"] == "error":
            code, _, words = row["reason"].partition(": ")
            assert rows[row["path"]] == 1 and row["face_id"] is None and row["failed_stage"] in ("source", "align")
            assert code in DOCUMENTED and words.strip() and "\n" not in row["reason"], (entry, row["reason"])
        else:
            code = None
            assert row["status"] == "ok" or row["reason"].startswith("NO_FACE: "), row
        if code not in entry.expected:
            wrong.append((entry, row["reason"]))
    assert not wrong
    good = [row for row in told["rows"] if paths[row["path"]].kind == "good"]
    assert {row["status"] for row in good} == {"ok", "no_face"}, "photos with a face, and without, are among the good"

    # A batch's decoded photos (8 x 3 bytes a pixel at most), and as much again for copies, files and the detector.
    record_property("memory_grown", told["memory_grown"])
    record_property("slowest", told["slowest"])
    print(f"memory grown by {told['memory_grown'] / 2**20:.0f} MiB; slowest batch {told['slowest']}")
    assert told["memory_grown"] < 8 * 3 * 2 * MAX_PIXELS
    assert told["slowest"][0] < 60
