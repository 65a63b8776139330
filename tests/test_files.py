import pytest

from mateconv_jax import files


def test_a_file_is_there_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "before")
    with pytest.raises(ValueError), files.aside(path) as written:
        written.write_text("half")
        raise ValueError
    assert path.read_text() == "before"
    files.write_text(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "after"


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "mistyped" / "a", "a")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / "a.partial" / "a").mkdir(parents=True)
    (tmp_path / "a.partial" / "a" / "old").touch()
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "b").touch()
    with files.aside(tmp_path / "a", folder=True) as written:
        (written / "new").touch()
    files.write_text(tmp_path / "b", "b")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "a/new", "b"]


def test_what_others_put_at_the_partial_path_is_never_removed(tmp_path):
    (tmp_path / "a.partial").write_text("a download")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "notes.txt").write_text("notes")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError, match="In the way"):
            files.write_text(tmp_path / name, "text")
    assert (tmp_path / "a.partial").read_text() == "a download"
    assert (tmp_path / "b.partial" / "notes.txt").read_text() == "notes"


def test_a_folder_is_replaced_only_when_told(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(OSError), files.aside(tmp_path / "a", folder=True):
        pass
    assert (tmp_path / "a" / "old").exists()
    with files.aside(tmp_path / "a", folder=True, replace_folder=True) as written:
        (written / "new").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_a_folder_whose_replacing_was_interrupted_comes_back(tmp_path):
    """Killed between the two renames: nothing stands at the path."""
    (tmp_path / "a.partial" / "replaced").mkdir(parents=True)
    (tmp_path / "a.partial" / "replaced" / "old").touch()
    with pytest.raises(ValueError), files.aside(tmp_path / "a", folder=True, replace_folder=True):
        raise ValueError
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["old"]
