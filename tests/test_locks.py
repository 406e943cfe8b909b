"""One process at a time in a folder: the holder is named, a killed one's lock is taken over, nobody waits for ever."""

import gc
import json
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from fastagop.kernels import atomic_files

from fastagop import DeepRFMClassifier, locks
from fastagop.locks import FolderInUse, Lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks children")


@pytest.fixture
def blobs(normal):
    """(X, y): four classes of twenty points."""
    return normal(80, 6).numpy(), [k % 4 for k in range(80)]


def model(folder, **changes):
    return DeepRFMClassifier(**{"depth": 2, "width": 16, "random_state": 0, "checkpoint_dir": folder, **changes})


def holding(folder):
    """A child that holds the folder's lock until it is killed."""
    pid = os.fork()
    if pid == 0:
        lock = Lock(folder)
        time.sleep(120)
        lock.close()
        os._exit(0)
    deadline = time.monotonic() + 60
    while locks._read(folder / ".lock") is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pid


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_holder_is_refused_and_the_first_named(tmp_path):
    with Lock(tmp_path, "checkpoint_dir"):
        with pytest.raises(FolderInUse, match=rf"in use by process {os.getpid()} on .+ \(since \d{{4}}-.+\)"):
            Lock(tmp_path, "checkpoint_dir")
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).close()


def test_another_process_is_named_and_its_lock_taken_over_when_it_is_killed(tmp_path):
    pid = holding(tmp_path)
    try:
        with pytest.raises(FolderInUse, match=f"process {pid} on"):
            Lock(tmp_path)
        os.kill(pid, signal.SIGSTOP)
        while atomic_files.process_state(locks._read(tmp_path / ".lock").token) != atomic_files.STOPPED:
            time.sleep(0.01)
        start = time.monotonic()
        with pytest.raises(FolderInUse, match=f"which is stopped: `kill -CONT {pid}`"):
            Lock(tmp_path)
        assert time.monotonic() - start < 5
    finally:
        end(pid)
    assert (tmp_path / ".lock").exists()
    Lock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 9000, b"[" * 4000, b'{"pid": "x"}'])
def test_a_left_lock_file_of_any_content_is_no_lock(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()


def test_forked_children_do_not_keep_the_lock(tmp_path):
    lock = Lock(tmp_path)
    pid = os.fork()
    if pid == 0:
        lock.close()  # the parent's, not the child's to give back
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.1)
        assert (tmp_path / ".lock").exists()
        lock.close()
        Lock(tmp_path).close()
    finally:
        end(pid)


def test_a_forgotten_lock_goes_with_its_object(tmp_path):
    lock = Lock(tmp_path)
    del lock
    gc.collect()
    Lock(tmp_path).close()


def test_without_locks_of_the_system_the_written_holder_decides(tmp_path, monkeypatch):
    def lacking(*_):
        raise OSError(95, "Operation not supported")

    pid = holding(tmp_path)
    try:
        monkeypatch.setattr(locks.fcntl, "flock", lacking)
        with pytest.raises(FolderInUse, match=f"process {pid}"):
            Lock(tmp_path)
    finally:
        end(pid)
    Lock(tmp_path).close()
    metadata = {"pid": 1, "host": "far", "since": "yesterday", "token": "00000000-1-1"}
    (tmp_path / ".lock").write_text(json.dumps(metadata))
    with pytest.raises(FolderInUse, match=r"process 1 on far .*remove .*\.lock if that process is gone"):
        Lock(tmp_path)


def test_a_folder_that_only_can_be_read_is_not_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Lock(tmp_path), Lock(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_waiting_ends_when_the_holder_does(tmp_path):
    messages, entered = [], threading.Event()

    def second():
        with locks.waiting(tmp_path, messages.append):
            entered.set()

    with locks.waiting(tmp_path, messages.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.5)
    assert entered.wait(20)
    thread.join()
    assert len(messages) == 1
    assert f"process {os.getpid()}" in messages[0]


def test_waiting_for_a_stopped_process_is_refused(tmp_path):
    pid = holding(tmp_path)
    try:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        with pytest.raises(FolderInUse, match="stopped"), locks.waiting(tmp_path, print):
            pass
    finally:
        end(pid)


# ---- In a fit


def test_a_fit_inside_a_fit_on_the_same_folder_is_refused(tmp_path, blobs):
    refused = []

    def again(event):
        try:
            model(tmp_path).fit(*blobs)
        except FolderInUse as error:
            refused.append(str(error))

    model(tmp_path, callbacks=[again]).fit(*blobs)
    assert len(refused) == 2
    assert f"checkpoint_dir {tmp_path} is in use by process {os.getpid()}" in refused[0]
    assert not (tmp_path / ".lock").exists()


def test_an_error_gives_the_folder_back(tmp_path, blobs):
    def fail(event):
        raise RuntimeError("mine")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            model(tmp_path, callbacks=[fail]).fit(*blobs)
    with pytest.raises(ValueError, match="width was 16, now 8"):
        model(tmp_path, width=8).fit(*blobs)
    model(tmp_path).fit(*blobs)
    (tmp_path / "layer-000.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="layer-000"):
            model(tmp_path).fit(*blobs)


def test_an_unreadable_layer_is_not_called_missing(tmp_path, blobs, monkeypatch):
    """Nothing tells to remove a folder whose layers may be whole."""
    model(tmp_path).fit(*blobs)
    plain = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).endswith("layer-001.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*cannot be read.*layer-001") as caught:
        model(tmp_path).fit(*blobs)
    assert "emove" not in str(caught.value)
    monkeypatch.undo()
    (tmp_path / "layer-001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layer-001.safetensors is missing"):
        model(tmp_path).fit(*blobs)


def test_layers_of_two_runs_of_one_fit_are_the_same_layers(tmp_path, blobs):
    """Their files differ in the seconds they took, which is no reason to refuse a folder."""
    for name in "ab":
        model(tmp_path / name).fit(*blobs)
    one, two = (tmp_path / name / "layer-001.safetensors" for name in "ab")
    assert one.read_bytes() != two.read_bytes()
    os.replace(two, one)
    model(tmp_path / "a").fit(*blobs)


def test_a_complete_folder_resumes_where_nothing_can_be_written(tmp_path, blobs):
    expected = model(tmp_path).fit(*blobs).decision_function(blobs[0])
    for path in tmp_path.iterdir():
        path.chmod(stat.S_IRUSR)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        found = model(tmp_path).fit(*blobs).decision_function(blobs[0])
    finally:
        tmp_path.chmod(stat.S_IRWXU)
    assert (found == expected).all()


@pytest.mark.parametrize(
    ("cases", "printed"),
    [
        (("pairs", "3"), "3 pairs"),
        (("loads", "40"), "40 loads, none broken"),
        (("stopped",), "a stopped holder is named"),
    ],
)
def test_races(python, cases, printed):
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); sys.argv[1:] = {list(cases)}\n"
    assert printed in python(code + "import race_cases; race_cases.main()")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_locks_leave_no_file_open(tmp_path):
    Lock(tmp_path).close()
    gc.collect()
    before = open_files()
    with Lock(tmp_path):
        assert open_files() == before + 1
        for _ in range(3):
            with pytest.raises(FolderInUse):
                Lock(tmp_path)
        assert open_files() == before + 1
    assert open_files() == before
    assert not (tmp_path / ".lock").exists()


def test_a_file_that_names_nobody(tmp_path):
    assert locks._read(tmp_path / "none") is None
    path = tmp_path / ".lock"
    for text in ("", "[]", "{}", '{"pid": "x"}', '{"pid": 1, "host": "h", "since": "s"}'):
        path.write_text(text)
        assert locks._read(path) is None
    entry = '{"pid": 1, "host": "h", "since": "s", "token": "t"}'
    path.write_text(entry + " " * (4096 - len(entry)) + "x")  # at most 4096 bytes are read
    assert locks._read(path) == locks.Holder(1, "h", "s", "t")
    path.write_text(" " * (4097 - len(entry)) + entry)
    assert locks._read(path) is None


def test_what_a_lock_says_of_its_holder(tmp_path, monkeypatch):
    with Lock(tmp_path):
        holder = locks._read(tmp_path / ".lock")
    assert holder.pid == os.getpid()
    start = f"process {holder.pid} on {holder.host} (since {holder.since}"
    for state, words in (
        (locks.atomic_files.STOPPED, f", which is stopped: `kill -CONT {holder.pid}` continues it"),
        (locks.atomic_files.ENDED, ", which has ended, but left a process behind that holds the lock"),
        (locks.atomic_files.ELSEWHERE, ", which cannot be asked from here"),
        ("any other", ""),
    ):
        monkeypatch.setattr(locks.atomic_files, "process_state", lambda token, state=state: state)
        assert str(holder) == f"{start}{words})"
