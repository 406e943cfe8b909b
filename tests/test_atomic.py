"""Files are there whole or not at all: own temporaries, no links followed, nothing left behind, honest errors."""

import errno
import os
import stat
import threading
import time

import pytest
from fastagop.kernels import atomic_files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path):
    for content in (b"first", b"second, and longer", b""):
        atomic_files.write(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert names(tmp_path) == ["a"]


def test_an_old_fixed_temporary_name_is_not_used(tmp_path):
    """A link where an earlier version put its temporary leads nowhere that is written to."""
    (tmp_path / "victim").write_bytes(b"precious")
    for name in ("a.tmp", ".a.tmp", f".a.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    atomic_files.write(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_link_at_the_path_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    atomic_files.write(tmp_path / "a", b"new")
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_obey_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        atomic_files.write(tmp_path / "a", b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS, errno.EBADF])
def test_a_folder_that_cannot_be_settled_is_no_failure(tmp_path, monkeypatch, code):
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_files.write(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_folder_that_cannot_be_opened_is_no_failure(tmp_path, monkeypatch):
    plain = os.open

    def refuse(path, flags, *mode):
        if not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    atomic_files.write(tmp_path / "a", b"1")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failure_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, code, where):
    atomic_files.write(tmp_path / "a", b"old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match=r"/a'$") as caught:
        atomic_files.write(tmp_path / "a", b"new")
    assert caught.value.errno == code
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("path", "error"), [("nowhere/a", FileNotFoundError), ("file/a", NotADirectoryError), ("folder", IsADirectoryError)]
)
def test_places_that_cannot_be_written_to(tmp_path, path, error):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=rf"{path}'$"):
        atomic_files.write(tmp_path / path, b"1")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_devices_are_written_to_as_they_are():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        atomic_files.write("/dev/full", b"1")
    atomic_files.write("/dev/null", b"1")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["a", "x" * 255, "é" * 120, ".hidden", "with space\nand line"])
def test_any_name_that_the_file_system_takes(tmp_path, name):
    atomic_files.write(tmp_path / name, b"1")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a", "x" * 255])
def test_what_killed_writers_left_is_removed_by_the_next(tmp_path, name):
    """Only that: not what a living process writes, nor a name that merely looks similar."""
    pid = os.fork() if hasattr(os, "fork") else pytest.skip("forks")
    if pid == 0:  # killed between writing and renaming
        os.replace = lambda *_: os.kill(os.getpid(), 9)
        atomic_files.write(tmp_path / name, b"half")
    os.waitpid(pid, 0)
    (left,) = names(tmp_path)
    alive = left.replace(f"-{pid}-", f"-{os.getpid()}-").rpartition(f"-{os.getpid()}-")[0]
    alive += f"-{atomic_files.process_token().split('-', 1)[1]}.00000000.tmp"
    others = [alive, ".a.tmp", ".a.1234.tmp", ".b." + left.split(".", 2)[2]]
    for other in others:
        (tmp_path / other).write_bytes(b"")
    atomic_files.write(tmp_path / name, b"whole")
    assert left not in names(tmp_path)
    assert names(tmp_path) == sorted([name, *others])


def test_another_hosts_temporaries_go_when_they_are_old(tmp_path):
    fresh, old = (tmp_path / f".a.00000000-77-{i}.0123abcd.tmp" for i in range(2))
    for path in (fresh, old):
        path.write_bytes(b"")
    os.utime(old, (0, time.time() - 2 * 86400))
    atomic_files.write(tmp_path / "a", b"1")
    assert names(tmp_path) == [fresh.name, "a"]


def test_threads_that_write_one_file_publish_whole_ones(tmp_path):
    contents, broken, done = [bytes([k]) * 200_000 for k in range(4)], [], threading.Event()
    atomic_files.write(tmp_path / "a", contents[0])

    def write(content):
        while not done.is_set():
            atomic_files.write(tmp_path / "a", content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for _ in range(300):
        if (tmp_path / "a").read_bytes() not in contents:
            broken.append(1)
    done.set()
    for thread in threads:
        thread.join()
    assert not broken
    assert names(tmp_path) == ["a"]


def test_what_became_of_a_process():
    mine = atomic_files.process_token()
    assert atomic_files.process_state(mine) == atomic_files.RUNNING
    place, pid, start = mine.split("-")
    assert atomic_files.process_state(f"{place}-{pid}-{int(start) + 1}") == atomic_files.ENDED  # the pid came back
    assert atomic_files.process_state(f"{place}-{2**22 + 7}-1") == atomic_files.ENDED
    assert atomic_files.process_state(f"{place}-{2**70}-1") == atomic_files.ENDED
    assert atomic_files.process_state(f"00000000-{pid}-{start}") == atomic_files.ELSEWHERE
    for nonsense in ("", "a-b-c", "1", f"{place}-0-0", f"{place}--5-1"):
        assert atomic_files.process_state(nonsense) == atomic_files.ELSEWHERE


def test_the_disk_has_the_file_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    """A crash in between finds the old file or the new one, whole."""
    settled, path = [], tmp_path / "a"
    path.write_bytes(b"old")

    def settle(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        settled.append(("folder" if folder else "file", path.read_bytes()))

    monkeypatch.setattr(os, "fsync", settle)
    atomic_files.write(path, b"new")
    assert settled == [("file", b"old"), ("folder", b"new")]
