"""A check in a process of its own: it may hang, take all memory, or die, and only it."""

import contextlib
import ctypes
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable

from fuzzing import OUTCOMES, Fault

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl, which Linux has

# What a check may take besides what its parent has, in GiB.
MEMORY = 4.0


def call(check: Callable[[dict], None], case: dict, seconds: float) -> dict[str, int]:
    """Returns the outcomes that a check counts; the process is a fork of this one.

    Raises:
      Fault: it raises another error, dies, or takes longer or more memory than it may.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _answer(check, case, write)
    os.close(write)
    try:
        content = _read(read, time.monotonic() + seconds)
    finally:
        os.close(read)
        if _running(child):
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    if content is None:
        raise Fault(f'hangs: {seconds:g} s')
    if not content:
        raise Fault(f'died: status {os.waitstatus_to_exitcode(status)}')
    outcomes, fault = json.loads(content)
    if fault:
        raise Fault(fault)
    if usage.ru_maxrss > MEMORY * 2**20:
        raise Fault(f'takes {usage.ru_maxrss / 2**20:.1f} GiB')
    return outcomes


def _answer(check, case, write):
    OUTCOMES.clear()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    fault = ''
    try:
        check(case)
    except BaseException as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if '/sam_jax/' in f.filename]
        where = f' at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}' if frames else ''
        fault = f'{type(e).__name__}{where}: {e}'
    try:
        os.write(write, json.dumps([OUTCOMES, fault]).encode())
    finally:  # whose parent is gone must not go on as it would
        os._exit(0)


def _read(file, end):
    """All that is written to a pipe; None if it is not closed in time."""
    content = b''
    while (left := end - time.monotonic()) > 0:
        if select.select([file], [], [], left)[0]:
            piece = os.read(file, 2**16)
            if not piece:
                return content
            content += piece
    return None


def _running(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
