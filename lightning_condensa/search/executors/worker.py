"""The other end of :class:`ProcessPool`: what a worker process does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch


@dataclass(frozen=True)
class Reply:
    """How a task ended.

    Attributes:
        value: What it returned.
        error: What it raised.
        trace: Where it was raised.
    """

    value: Any = None
    error: BaseException | None = None
    trace: str = ""


def work(connection: Connection, threads: int, gpu: str | None) -> None:
    """Do tasks until the input or the parent ends.

    Args:
        connection: Gives pickled ``(function, args, kwargs)`` and takes pickled replies.
        threads: Threads of torch here and in this process's children.
        gpu: The only CUDA device to be seen; all where ``None``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):  # a group, to find the children by when this process is gone
        os.setpgid(0, 0)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(payload))


def _answer(payload: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(payload)
        return pickle.dumps(Reply(function(*args, **kwargs)))
    except BaseException as error:  # the parent's to judge, SystemExit too
        trace = traceback.format_exc()
        try:
            answer = pickle.dumps(Reply(error=error, trace=trace))
            pickle.loads(answer)  # exceptions with arguments of their own may fail only here
        except Exception:
            text = f"{type(error).__name__}: {error}"
            answer = pickle.dumps(Reply(error=RuntimeError(text), trace=trace))
        return answer


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def kill_group(process: BaseProcess) -> None:
    """Kill a worker and its children, or those that it left when it died just now.

    Args:
        process: The worker; one that is starting has neither group nor children.
    """
    assert process.pid is not None
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
