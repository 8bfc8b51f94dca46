"""The program that a grading function runs in: a keeper, and below it the process that calls the function.

The keeper adopts whatever the function leaves behind, daemons too. When the function's process ends, when the caller
is gone or when it is told to, it kills all of that and ends. It imports nothing of the house, so that it starts fast.

Arguments: the caller's process id; the function's reference, for whoever reads a list of processes. Standard input:
frames of pickle, eight bytes of length before each; the first says what to load, the others are one call each. Standard
output: a line of JSON for each frame, and at the end how the function's process ended. Linux only.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import reprlib
import resource
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LONGEST_ERROR = 300  # characters
LENGTH_BYTES = 8
KILL_SECONDS = 5.0  # after which what cannot be killed is left to the system
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(caller: int) -> None:
    """The keeper, from the program's start to its end."""
    requests, answers = os.dup(0), os.dup(1)  # copies are closed in what the function starts
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        for descriptor in (null, wake, waker):
            os.close(descriptor)
        _run(requests, answers)
    how = _watch(child, caller, requests, wake)
    _kill_descendants()
    if how:
        with contextlib.suppress(OSError):
            os.write(answers, _line({"ended": how}))


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0)))


def _watch(child: int, caller: int, requests: int, wake: int) -> str:
    """Returns when it is time to end, with how the child ended, or nothing where it was not the child."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(requests, 0)  # a closed other end is told of unasked
    while True:
        ready = dict(poll.poll(1000))
        # A copy of the caller, such as a process that loads data, may hold the other end after the caller's death.
        if requests in ready or os.getppid() != caller:
            return ""
        if wake in ready:
            if signal.SIGTERM in os.read(wake, 4096):
                return ""
            if (status := _reap().get(child)) is not None:
                return exit_text(os.waitstatus_to_exitcode(status))


def exit_text(code: int) -> str:
    """How a process ended, by what `subprocess` calls its returncode."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"signal {-code}"


def _reap() -> dict[int, int]:
    """The statuses of the children that have ended, adopted ones too."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def descendants(root: int) -> list[int]:
    """The processes below one, in whatever depth, whatever session they have made for themselves."""
    children = defaultdict(list)
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The name before the last bracket may hold anything.
            fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
            children[int(fields[1])].append(int(entry))
    found, parents = [], [root]
    while parents := [child for parent in parents for child in children[parent]]:
        found += parents
    return found


def _kill_descendants() -> None:
    end = time.monotonic() + KILL_SECONDS
    while time.monotonic() < end:
        stopped: set[int] = set()
        # Stopped first, so that none starts another while the others are killed.
        while running := set(descendants(os.getpid())) - stopped:
            send(running, signal.SIGSTOP)
            stopped |= running
        if not stopped:
            return
        send(stopped, signal.SIGKILL)
        time.sleep(0.001)
        _reap()


def send(processes: Iterable[int], number: int) -> None:
    """A signal to each process that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _run(requests: int, answers: int) -> NoReturn:
    """The function's process: loads the function and calls it for every frame, until there are no more."""
    try:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        own = os.getpid()
        with open(requests, "rb") as stream:
            setup = pickle.loads(_frame(stream))
            _limit(setup["memory_bytes"])
            function, answer = _loaded(setup)
            while True:
                # The function may have copied this process: the copy ends here.
                if os.getpid() != own:
                    break
                os.write(answers, _line(answer))
                if function is None or not (content := _frame(stream)):
                    break
                answer = _answer(function, content, setup["path"])
                signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that it forgot is not the next call's
    finally:
        os._exit(0)  # past everything that the function wants done at exit


def _frame(stream: BinaryIO) -> bytes:
    """The next frame's content, empty at the end."""
    return stream.read(int.from_bytes(stream.read(LENGTH_BYTES), "big"))


def _line(message: dict[str, Any]) -> bytes:
    # Below a pipe's 4,096 bytes, within which a line is written whole or not at all.
    return json.dumps(message).encode() + b"\n"


def _limit(memory_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # a full machine takes this before the run


def _loaded(setup: dict[str, Any]) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """The function, and the greeting."""
    path = setup["path"]
    try:
        own_folder = [] if setup["built_in"] else [os.path.dirname(path)]
        sys.path[:] = own_folder + setup["search"]
        if setup["library"]:
            importlib.import_module(setup["library"])  # takes long, and is not the first call's time
        module = _module(path, setup["source"])
        name, column = setup["function"], setup["column"]
        function = getattr(module, name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            return None, _error(f"has no function {name}; it has {', '.join(filter(str.isidentifier, own)) or 'none'}")
        if problem := _misfit(function):
            return None, _error(f"{name}{problem}")
        return partial(function, column=column) if column else function, {"ready": True}
    except BaseException as error:  # SystemExit too
        return None, _error(_description(error, path))


def _module(path: str, source: bytes) -> Any:
    """The file as the module of its name, from the source that was read when the run began."""
    name = Path(path).stem
    if name in sys.modules or name in sys.stdlib_module_names:
        name = f"grading_{name}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module  # dataclasses look theirs up
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _misfit(function: Callable[..., Any]) -> str:
    """Why a function cannot be called with a record and a completion; empty where it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of those written in C tell nothing
        return ""
    try:
        signature.bind({}, "")
    except TypeError:
        return f"{signature} cannot be called with a record and a completion"
    return ""


def _answer(function: Callable[..., Any], content: bytes, path: str) -> dict[str, Any]:
    """What a call gives. Nothing gets past here, whatever the function raises."""
    try:
        record, completion = pickle.loads(content)
    except BaseException as error:
        return _error(f"its record cannot be read in the function's process: {_description(error, path)}")
    try:
        return _number(function(record, completion))
    except BaseException as error:
        return _error(_description(error, path))


def _number(value: Any) -> dict[str, Any]:
    if value is None:
        return {"value": None}
    if not isinstance(value, str | bytes | bytearray):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):  # the last is of torch
            if math.isfinite(number := float(value)):
                return {"value": number}
    return _error(f"found {reprlib.repr(value)}, expected a finite number")


def _error(text: str) -> dict[str, Any]:
    text = " ".join(text.encode(errors="replace").decode().split())
    return {"error": text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 3]}..."}


def _description(error: BaseException, path: str) -> str:
    """What was raised, and in which line of the function's file."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    # Lets go of what the function held, so that there is memory again for this text.
    error.__traceback__ = error.__context__ = error.__cause__ = None
    try:
        said = error.msg if isinstance(error, SyntaxError) else str(error)[: 2 * LONGEST_ERROR]
    except BaseException:  # its own __str__
        said = ""
    kind = type(error).__name__
    return f"{f'line {line}: ' if line else ''}{kind}{f': {said}' if said else ''}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
