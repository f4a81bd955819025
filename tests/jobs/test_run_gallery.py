"""A driver that makes the run's gallery hears a request to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config.load import load_config
from pipelines.jobs.run_gallery import RunGallery
from pipelines.run.folder import Run


def test_a_gallery_in_the_making_can_be_stopped_and_made_later(tmp_path: Path) -> None:
    run, config = Run(str(tmp_path / "run")), load_config(sets=["gallery.synthetic=64", "fuse.k=3"])
    with pytest.raises(KeyboardInterrupt):
        RunGallery.open(config, run, str, lambda: True)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    gallery = RunGallery.open(config, run, str, lambda: False)
    assert gallery.info.count == 64 and gallery.url.startswith(str(tmp_path))
