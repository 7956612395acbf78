"""Running a command: errors as one line, exit statuses, Ctrl-C; short ones without the interpreter's own work."""

from __future__ import annotations

import atexit
import contextlib
import dis
import errno
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from spo_fast.config.errors import RunError, UsageError
from spo_fast.config.outside import LOADED

PACKAGE = Path(__file__).parents[1]


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no run is there yet (or any more) that could save."""


def main(build: Callable[[], Any], arguments: list[str] | None = None) -> int:
    """Build a run (it has train() and last_checkpoint()) and train it. Returns the exit status; see `guarded`."""

    def work() -> None:
        try:
            run = build()
        except KeyboardInterrupt as stopped:
            raise type(stopped)("training had not begun") from None

        try:
            run.train()
        except KeyboardInterrupt as stopped:
            last = run.last_checkpoint()
            goes_on = (
                f"--resume_from_checkpoint latest goes on from {last}" if last else "no checkpoint was written yet"
            )
            raise type(stopped)(goes_on) from None

    return guarded(work, arguments)


def guarded(work: Callable[[], Any], arguments: list[str] | None = None) -> int:
    """Do a command's work and return its exit status: 0, 130 after Ctrl-C, 143 after SIGTERM, 2 for wrong usage, 1 for
    other errors.

    An error is one line on stderr (a table of missing files some more); --debug adds the traceback.
    """
    os.environ.update(for_pytorch(os.environ))
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    rank = os.environ.get("RANK", "0")  # of several processes only the first one talks, but errors are all's
    who = "" if rank == "0" else f"[rank {rank}] "
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(terminated())
            if who:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            work()
    except KeyboardInterrupt as error:
        by, status = (" by SIGTERM", 143) if isinstance(error, Terminated) else ("", 130)
        print(f"{who}stopped{by}" + "".join(f"; {arg}" for arg in error.args), file=sys.stderr)
        return status
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{who}error: {error_text(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Inside, Python does not look for reference cycles: nothing is garbage of what imports make, 650,000 objects.

    For imports and for what ends soon; where weights are loaded cycles would keep them.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def leave(status: int) -> NoReturn:
    """sys.exit(status) without taking every object apart, which after a dry run lasts a second.

    What is registered with atexit is called first. For commands that leave no file open and no thread at work. Where
    a profiler, a debugger or a coverage tool looks on, or python -i, it is sys.exit: they go on when the program ends.
    """
    if _is_watched():
        sys.exit(status)
    try:
        _flush()
    except OSError:  # nobody reads any more: Python says it and has a status for it
        sys.exit(status)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        _flush()  # what was said at the exit
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed before the start
            stream.flush()


def _is_watched() -> bool:
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = [] if monitoring is None else [monitoring.get_tool(number) for number in range(6)]
    return sys.gettrace() is not None or sys.getprofile() is not None or any(tools) or bool(sys.flags.inspect)


def for_pytorch(environment: Mapping[str, str]) -> dict[str, str]:
    """What PyTorch should read when it is loaded, as far as the environment says nothing of it."""
    # OpenMP threads that spin while they wait make a shared CPU several times slower
    found = {} if "OMP_WAIT_POLICY" in environment else {"OMP_WAIT_POLICY": "PASSIVE"}
    # segments that grow leave no fragments: without them as much as 1.4 times what is used stays reserved on a GPU.
    # PyTorch 2.10 to 2.13 read all of these names; where the driver has no such segments PyTorch warns
    named = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    if sys.platform == "linux" and not named & environment.keys():
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # on a CPU large tensors in pages of 2 MiB, where Linux has them: fewer to clear, and to look up
    if sys.platform == "linux" and "THP_MEM_ALLOC_ENABLE" not in environment:
        found["THP_MEM_ALLOC_ENABLE"] = "1"
    return found


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated. A run in training takes the signal itself (training/signals.py)."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # Python lets no other install handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def error_text(error: Exception) -> str:
    """What a user needs to know of an error."""
    from safetensors import SafetensorError

    from spo_fast.config.errors import MissingFilesError

    if isinstance(error, MissingFilesError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # the system's own, [Errno 20] Not a directory: 'runs/a/samples'
        paths = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        text = f"{paths}: {error.strerror}" if paths else error.strerror
        if error.errno != errno.ENOSPC:
            return f"{text}. Mend or move what stands there, or give another path (--debug shows what needed it)."
    if "No space left on device" in text:
        return f"{text}. Free some space, or keep fewer checkpoints (--checkpoints_total_limit)."
    if type(error).__name__ == "OutOfMemoryError":  # what the trainer of policies does not explain itself
        return f"{text} Lower --train_batch_size (--gradient_accumulation_steps makes up for it) or --decode_chunk."
    foreseen = isinstance(error, (RunError, UsageError, OSError, ImportError, SafetensorError))
    if foreseen or (isinstance(error, (ValueError, RuntimeError)) and raised_here(error)):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    if mine := next((f for f in reversed(frames) if f.filename in LOADED), None):
        at = f"{Path(mine.filename).name}, line {mine.lineno}"
        return f"{LOADED[mine.filename]}: {type(error).__name__} at {at}: {text:.150}. Mend that file."
    last = next((f for f in reversed(frames) if Path(f.filename).is_relative_to(PACKAGE)), frames[-1])
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"unexpected {type(error).__name__} at {where}: {text}. Repeat with --debug for the traceback and report it."


def raised_here(error: Exception) -> bool:
    """By a `raise` of this package, which names fault and remedy, and not by something that it called."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    return Path(code.co_filename).is_relative_to(PACKAGE) and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
