"""Downloads from servers that fail in every usual way, and what runs where there is no network at all."""

import contextlib
import hashlib
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules import download
from datamodules.download import fetch
from datamodules.voc import unpack

CONTENT = bytes(range(256)) * 64
MD5 = hashlib.md5(CONTENT).hexdigest()
ROOT = Path(__file__).parents[2]


class Faulty(ThreadingHTTPServer):
    """Does at ``/a,b,c/file`` the first time a, then b, and from then on c."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = Counter()
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # whoever reset the connection knows


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        plan = self.path.split("/")[1].split(",")
        with self.server.lock:
            number = self.server.asked[self.path]
            self.server.asked[self.path] += 1
        getattr(self, plan[min(number, len(plan) - 1)])()

    def good(self, content=CONTENT, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def missing(self):
        self.send_error(404)

    def busy(self):
        self.send_error(503)

    def short(self):
        self.good(CONTENT[:1000])

    def wrong(self):
        self.good(CONTENT[:-1] + b"?")

    def page(self):
        self.good(b"<html>please log in</html>", 26)

    def stall(self):
        self.good(CONTENT[:1000])
        time.sleep(1.5)

    def trickle(self):
        """A byte now and then, for ever: each wait for the next one is short."""
        self.good(b"")
        with contextlib.suppress(OSError):  # the client has given up
            for byte in CONTENT:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

    def unannounced(self):
        """The file without its length, as some servers send what they pack on the way."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT)

    def slow(self):
        time.sleep(0.3)
        self.good()

    def reset(self):
        self.good(CONTENT[:1000])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "MIRROR_TIMEOUT", 1.0)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    faulty = Faulty()
    threading.Thread(target=faulty.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield faulty
    faulty.shutdown()
    faulty.server_close()


def mirrors(server, *plans):
    return [f"http://127.0.0.1:{server.server_port}/{plan}/" for plan in plans]


PASSING = ("busy", "short", "wrong", "page", "stall", "trickle", "reset")


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again(fault, server, tmp_path):
    fetch(mirrors(server, f"{fault},good"), "file", MD5, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert sum(server.asked.values()) == 2


@pytest.mark.parametrize("fault", ["missing", *PASSING])
def test_the_next_mirror_is_asked_before_that(fault, server, tmp_path):
    fetch(mirrors(server, fault, "good"), "file", MD5, tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert list(server.asked.values()) == [1, 1]


@pytest.mark.parametrize("fault", ["missing", *PASSING])
def test_a_fault_that_stays_is_named_and_leaves_nothing(fault, server, tmp_path):
    places = mirrors(server, fault)
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as caught:
        fetch(places, "file", MD5, tmp_path)
    assert f"{places[0]}file: " in str(caught.value)
    assert f"Put the file into {tmp_path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert sum(server.asked.values()) == (1 if fault == "missing" else 2)


def test_a_server_that_trickles_is_given_up_and_a_slow_one_is_not(server, tmp_path, monkeypatch):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"too slow: \d\d bytes in 1 seconds"):
        fetch(mirrors(server, "trickle"), "file", MD5, tmp_path)
    assert time.monotonic() - began < 5, "two tries of a second each"
    monkeypatch.setattr(download, "SLOWEST", 5)  # of the 20 bytes a second that come
    monkeypatch.setattr(download, "MIRROR_TIMEOUT", 0.2)
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", CONTENT[:40])
    fetch(mirrors(server, "trickle"), "file", hashlib.md5(CONTENT).hexdigest(), tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_without_a_length_is_read_to_its_end(server, tmp_path):
    fetch(mirrors(server, "unannounced"), "file", MD5, tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        fetch([address], "file", MD5, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_until_the_new_one_is_whole(server, tmp_path):
    (tmp_path / "file").write_bytes(b"there before")
    fetch(mirrors(server, "good"), "file", MD5, tmp_path)
    assert (tmp_path / "file").read_bytes() == b"there before"
    assert not server.asked


def test_one_process_downloads_and_the_others_wait_for_it(server, tmp_path):
    context = multiprocessing.get_context("fork")
    places = mirrors(server, "slow")
    several = [context.Process(target=fetch, args=(places, "file", MD5, tmp_path)) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(20)
    assert [process.exitcode for process in several] == [0] * 4
    assert sum(server.asked.values()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_killed_download_neither_locks_the_others_out_nor_leaves_a_part_for_ever(server, tmp_path):
    context = multiprocessing.get_context("fork")
    stuck = context.Process(target=fetch, args=(mirrors(server, "slow,good"), "file", MD5, tmp_path))
    stuck.start()
    while not server.asked:
        time.sleep(0.01)
    stuck.kill()
    stuck.join()
    assert len(list(tmp_path.iterdir())) == 1
    fetch(mirrors(server, "good"), "file", MD5, tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_is_removed_by_the_next_and_not_what_one_is_at_work_on(tmp_path):
    for left in (".unpacking-a", ".unpacking-b"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "1.jpg").write_bytes(b"half")
    with download.alone(tmp_path, ".unpacking-*"):
        assert list(tmp_path.iterdir()) == []
        (tmp_path / ".unpacking-c").mkdir()
        other = threading.Thread(target=enter, args=(tmp_path,))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert (tmp_path / ".unpacking-c").is_dir()
    other.join(20)
    assert list(tmp_path.iterdir()) == []


def enter(folder):
    with download.alone(folder, ".unpacking-*"):
        pass


def test_what_a_killed_unpacking_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".unpacking-x" / "JPEGImages").mkdir(parents=True)
    with tarfile.open(tmp_path / "VOC.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("VOC2007/Annotations/1.xml"))
    unpack(tmp_path / "VOC.tar", "VOC2007", tmp_path / "VOC2007")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOC.tar", "VOC2007"]


@pytest.mark.faults
def test_files_that_one_process_cannot_bring_end_all_of_them(tmp_path):
    command = [sys.executable, "-m", "zoo", "fit", "lenet/mnist", "--data.init_args.download", "false"]
    two = ["--data.init_args.root", str(tmp_path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    began = time.monotonic()
    ended = subprocess.run(
        [*command, *two, "--trainer.accelerator", "cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode != 0
    assert "lacks train-images-idx3-ubyte.gz" in ended.stderr
    assert time.monotonic() - began < 180  # of which most is the start of two processes


# No network

BLOCKED = """
import importlib, inspect, os, pkgutil, socket, sys
tried = []

class Blocked(OSError):
    pass

def refuse(*arguments, **named):
    tried.append(repr(arguments[-1]))
    raise Blocked("there is no network")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
os.environ.pop("WANDB_MODE", None)

import datamodules
import zoo

for package in (zoo, datamodules):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                print("not installed:", error.name)
import torch
for name in zoo.ARCHITECTURES:
    with torch.device("meta"):
        getattr(zoo, name)()
for name in datamodules.__all__:
    kind = getattr(datamodules, name)
    required = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    try:
        kind(**{parameter.name: "CartPole-v1" if parameter.name == "env" else "nowhere" for parameter in required})
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(name, "says", str(error)[:60])
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
for logger, options in ((CSVLogger, {"save_dir": "x"}), (TensorBoardLogger, {"save_dir": "x"}), (WandbLogger, {})):
    try:
        logger(**options)
    except ModuleNotFoundError as error:
        print("not installed:", error.name)
print("tried:", tried)
"""


@pytest.mark.faults
def test_no_import_and_no_constructor_tries_to_connect(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(BLOCKED)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1] == "tried: []", ended.stdout


def test_the_suite_itself_has_no_network():
    """So that the embedded recipes, which test_conformance.py runs with every command, need none."""
    with pytest.raises(OSError, match="a test tried to reach"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
