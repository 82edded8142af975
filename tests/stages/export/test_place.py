"""Where an export is made: links followed to the real folder, one lock by all names, places that can't be."""

from pathlib import Path

import pytest

from stages.export.folder import open_folder
from stages.export.place import Place, find_place
from stages.export.standing import Wanted
from state.durable import Disk
from state.errors import InputError, RunBusy
from tests.stages.export.kill_driver import IDENTITY, OTHER, make, tree


def test_the_names_beside_it() -> None:
    place = find_place(Path("exports/x"))
    assert place == Place(Path("exports/x"))
    assert place.partial == Path("exports/x.partial")
    assert place.new == Path("exports/.x.partial")
    assert place.lock == Path("exports/.x.lock")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "big disk" / "real", tmp_path / "out"
    real.mkdir(parents=True)
    link.symlink_to("big disk/real")
    make(link, OTHER, Disk())
    (real / "README.md").write_text("dear")
    make(link, IDENTITY, Disk(), overwrite=True)
    make(tmp_path / "whole", IDENTITY, Disk())
    assert link.is_symlink() and tree(real) == tree(tmp_path / "whole") | {"README.md": b"dear"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".whole.lock", "big disk", "out", "whole"]
    assert sorted(path.name for path in real.parent.iterdir()) == [".real.lock", "real"]


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("unmounted/x")
    with pytest.raises(InputError, match=r"out is a link to .*unmounted/x, which does not exist.*mkdir -p"):
        make(tmp_path / "out", IDENTITY, Disk())
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop is a link that leads nowhere"):
        make(tmp_path / "loop", IDENTITY, Disk())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "out"]


@pytest.mark.parametrize("other", ["link", "parent/out", "relative"])
def test_one_lock_however_it_is_reached(tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/out")
    (tmp_path / "parent").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    by_another_name = Path("out") if other == "relative" else tmp_path / other
    wanted = Wanted(IDENTITY, ())
    with (
        open_folder(tmp_path / "real" / "out", wanted, Disk()),
        pytest.raises(RunBusy, match="another process is exporting"),
        open_folder(by_another_name, wanted, Disk()),
    ):
        pass


@pytest.mark.parametrize("out", [Path(), Path("/"), Path("..")])
def test_places_that_cannot_be_made(out: Path) -> None:
    with pytest.raises(InputError, match="is no name for a folder"):
        make(out, IDENTITY, Disk())


def test_a_mount_point() -> None:
    with pytest.raises(InputError, match="/proc is a mount point"):
        find_place(Path("/proc"))


def test_files_where_folders_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; OUT must be a folder"):
        make(tmp_path / "file", IDENTITY, Disk())
    with pytest.raises(InputError, match=r"file is not a folder, so .* can't be made"):
        make(tmp_path / "file" / "out", IDENTITY, Disk())
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(InputError, match="file is a file; OUT must be a folder"):
        make(tmp_path / "link", IDENTITY, Disk())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
