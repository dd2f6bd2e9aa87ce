"""Processes of one run end together: when one dies, the others say which and why, and do not wait for it for ever."""

import atexit
import hmac
import os
import secrets
import selectors
import socket
import sys
import textwrap
import threading
import time
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

PATIENCE = 10.0  # seconds in which a process may end by its own error before it is ended
CONNECTING = 30.0  # seconds
GIVING_BACK = 0.2  # seconds; only of torch before 2.8
SILENCE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine that is lost is noticed after 40 s


class EndTogether(Callback):
    """Ends all processes of a run within a minute of the death of one of them, and names it and its cause.

    A process that waits for another in an exchange of gradients waits for ever on GPUs, or for many minutes, and says
    at the end that time ran out. Here each holds an open connection to the first one. The operating system closes it
    when a process ends, however it ends, which is noticed at once; nothing is sent while all goes well, and no work,
    however long, is taken for a death. The first process tells the others.

    The connection is there when callbacks are set up, or with :meth:`from_the_start`, as commands have it, before the
    data are prepared. With one process there is nothing to do. A run that is asked to stop ends as
    :class:`~zoo.running.checkpoint.KeepLast` has it.
    """

    def __init__(self) -> None:
        self._peers: dict[int, socket.socket] = {}
        # Plain values: some strategies pickle callbacks.
        self._over = False  # this process has said that it ends well
        self._told = False  # who died is known here

    def from_the_start(self, trainer: Trainer) -> None:
        """Connect as soon as the processes know of each other, before the first one prepares the data.

        Lightning has no hook there. While one process downloads the others wait for days if need be.
        """
        trainer.strategy.setup_environment = partial(_set_up_and_connect, trainer, self)  # type: ignore[method-assign]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect, where that was not done before."""
        self.connect(trainer)

    def connect(self, trainer: Trainer) -> None:
        """Connect the processes of a run and watch them; all have to call it."""
        if trainer.world_size == 1 or not torch.distributed.is_initialized() or self._peers:
            return
        self._over, self._told = False, False
        try:
            self._connect(trainer)
        except OSError as error:
            rank_zero_warn(f"the processes cannot watch each other ({error}): if one dies, the others may hang")
        if self._peers:
            atexit.register(self._let_go)
            threading.Thread(target=self._watch, args=(trainer.global_rank,), name="zoo-ending", daemon=True).start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others why this process ends; not where all of them were asked to."""
        if not self._peers:
            return
        if isinstance(exception, SIGTERMException):
            self._leave()
            return
        text = f"{type(exception).__name__}: {exception}"
        if "peer" in text or "onnection" in text:  # another one's death, most likely: who is told in a moment
            deadline = time.monotonic() + 5
            while not self._told and time.monotonic() < deadline:
                time.sleep(0.05)
        if not self._told:
            self._send(f"{trainer.global_rank} {textwrap.shorten(text, 400)}", [*self._peers])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say that this process ends well."""
        self._leave()

    def _let_go(self) -> None:
        """Let the threads that exchange tensors give them back while there is an interpreter to give them back to.

        Else a run that has ended well is aborted now and then (https://github.com/pytorch/pytorch/issues/190489).
        Where processes died no exchange comes to its end: nothing is waited for.
        """
        if not self._over or not torch.distributed.is_initialized():
            return
        if torch.__version__ < "2.8":  # it waits for those threads, and keeps the lock that they wait for
            time.sleep(GIVING_BACK)
        else:
            torch.distributed.destroy_process_group()

    def _connect(self, trainer: Trainer) -> None:
        rank, count = trainer.global_rank, trainer.world_size
        alone = trainer.num_nodes == 1
        server = None
        address: tuple[str, int, str] = ("", 0, "")
        if rank == 0:
            server = socket.create_server(("127.0.0.1" if alone else "", 0), backlog=count)
            host = "127.0.0.1" if alone else os.environ.get("MASTER_ADDR", socket.gethostname())
            address = (host, server.getsockname()[1], secrets.token_hex(16))
        host, port, secret = trainer.strategy.broadcast(address)
        if server is None:
            first = socket.create_connection((host, port), timeout=CONNECTING)
            first.sendall(f"{secret} {rank}\n".encode())
            self._peers = {0: _kept_alive(first)}
            return
        with server:
            deadline = time.monotonic() + CONNECTING
            while len(self._peers) < count - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                caller, _ = server.accept()
                caller.settimeout(5)
                given, _, number = caller.makefile("r").readline().strip().partition(" ")
                if hmac.compare_digest(given, secret) and number.isdecimal():
                    self._peers[int(number)] = _kept_alive(caller)
                else:
                    caller.close()

    def _watch(self, rank: int) -> None:
        """Wait until another process says or shows that it ends."""
        with selectors.DefaultSelector() as selector:
            for number, watched in self._peers.items():
                selector.register(watched, selectors.EVENT_READ, number)
            while selector.get_map() and not self._over:
                for key, _ in selector.select(timeout=1):
                    peer: Any = key.fileobj
                    news = _read(peer)
                    if news != "bye":
                        cause = news or f"{key.data} it was killed (kill -9, out of memory), or its machine is lost"
                        self._end(rank, cause)
                        return
                    selector.unregister(peer)

    def _end(self, rank: int, cause: str) -> None:
        """Say who died and why, tell the others, and end this process if it does not end by itself."""
        if self._over:
            return
        number, _, why = cause.partition(" ")
        self._told = True
        print(f"zoo: process {number} of this run ended: {why}. Process {rank} ends too", file=sys.stderr, flush=True)
        if rank == 0:
            self._send(cause, [other for other in self._peers if str(other) != number])
        time.sleep(PATIENCE)
        sys.stderr.flush()
        os._exit(1)

    def _send(self, text: str, numbers: list[int]) -> None:
        for number in numbers:
            try:
                self._peers[number].sendall(f"{text}\n".encode())
            except OSError:  # it has ended already
                continue

    def _leave(self) -> None:
        if self._told:
            return
        self._over = True
        self._send("bye", [*self._peers])
        for peer in self._peers.values():
            peer.close()
        self._peers = {}


def _set_up_and_connect(trainer: Trainer, ending: EndTogether) -> None:
    type(trainer.strategy).setup_environment(trainer.strategy)
    ending.connect(trainer)


def _read(peer: socket.socket) -> str:
    """The line that was sent; nothing where the connection is gone."""
    try:
        return peer.makefile("r", errors="replace").readline().strip()
    except OSError:
        return ""


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENCE.items():
        if hasattr(socket, name):  # not every system has them
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
