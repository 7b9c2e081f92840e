"""Functions run in a process of their own, with limits: what crashes there, or never returns, costs no one else.

    with Worker(limits) as worker:
        result = worker.call(function, argument)      # function(watch, argument), in the process
        # or Lost: it raised, crashed or did not return, and while whose turn it was

One process serves all calls, so that its caches and threads are warm as they would be in one program; after a crash
the next call starts another. A function tells what it does through `watch`: `say` is for people, `turn` notes whose
code runs next, in memory that outlives a crash (0.3 us, and outside of what is timed).
"""

import ctypes
import dataclasses
import multiprocessing
import resource
import signal
from collections.abc import Callable
from typing import Any

from . import suites

POLL_SECONDS = 0.5
# For the imports of a fresh process, on a busy machine.
START_SECONDS = 300.0
# For what a process does at its end; one that hangs there is killed.
END_SECONDS = 10.0
NAME_BYTES = 200
PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)


def _ignore(text: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Watch:
    """Whom a function tells what it does next, and whose turn it is ("" is the harness itself)."""

    say: Callable[[str], None] = _ignore
    turn: Callable[[str], None] = _ignore


class Lost(Exception):
    """A call that gave no result. status: "failed" (it raised), "crashed" or "timed out"; turn: whose code it was."""

    def __init__(self, status: str, note: str, turn: str):
        super().__init__(status, note, turn)
        self.status, self.note, self.turn = status, note, turn

    def __str__(self):
        return f"{self.status}: {self.note}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """seconds: from one sign of life to the next; memory: bytes of private memory, None for no limit."""

    seconds: float
    memory: int | None = None


class _Turn(ctypes.Structure):
    _fields_ = (("count", ctypes.c_uint64), ("name", ctypes.c_char * NAME_BYTES))


class Worker:
    """The process; a context manager that ends it."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._context = multiprocessing.get_context("spawn")
        self._process = self._connection = self._turn = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind, *error) -> None:
        if self._process is not None and kind is None:
            # It ends itself, and cleans up: of a process that is killed, Python reports leaked semaphores.
            self._connection.close()
            self._process.join(END_SECONDS)
        self._end()

    def call(self, function: Callable, *arguments: Any, say: Callable[[str], None] = _ignore) -> Any:
        """function(watch, *arguments) in the process; what is passed and returned must pickle. Raises Lost."""
        try:
            if self._process is None:
                self._start()
            self._turn.name = b""
            self._connection.send((function, arguments))
            while True:
                kind, value = self._receive(self._limits.seconds)
                if kind == "result":
                    return value
                if kind == "raised":
                    raise Lost("failed", value, self._turn.name.decode())
                say(value)
        except (EOFError, ConnectionError):
            self._process.join()
            turn, note = self._turn.name.decode(), _ending(self._process.exitcode)
            self._end()
            raise Lost("crashed", note, turn) from None

    def _receive(self, limit: float) -> tuple[str, Any]:
        """The next message. Waiting is counted in polls: a machine that slept meanwhile slept for one poll."""
        waited, seen = 0.0, self._turn.count
        while not self._connection.poll(POLL_SECONDS):
            waited += POLL_SECONDS
            if seen != self._turn.count:
                waited, seen = 0.0, self._turn.count
            elif waited >= limit:
                turn = self._turn.name.decode()
                self._end()
                raise Lost("timed out", f"no sign of life for {limit:g} s", turn)
        return self._connection.recv()

    def _start(self) -> None:
        self._turn = self._context.RawValue(_Turn)
        self._connection, theirs = self._context.Pipe()
        arguments = theirs, self._turn, self._limits, suites.state()
        # Not a daemon, which could not start processes of its own, as measuring memory does.
        self._process = self._context.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        theirs.close()
        self._receive(START_SECONDS)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _ending(code: int) -> str:
    if code >= 0:
        return f"the process ended itself with code {code}"
    killed = signal.Signals(-code)
    hint = ": out of memory?" if killed is signal.SIGKILL else ""
    return f"{signal.strsignal(killed)} ({killed.name}){hint}"


def _serve(connection, turn: _Turn, limits: Limits, state: suites.State) -> None:
    """The process's life: calls until the other end is closed."""
    _confine(limits)
    suites.restore(state)

    def say(text):
        connection.send(("said", text))

    def note(name):
        turn.name = name.encode()[: NAME_BYTES - 1]
        turn.count += 1

    say("ready")
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = "result", function(Watch(say, note), *arguments)
        except Exception as error:
            answer = "raised", describe(error)
        connection.send(answer)


def _confine(limits: Limits) -> None:
    # Ctrl-C reaches every process of a terminal: the other end decides what becomes of this one, and dies with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PARENT_DIED, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))


def describe(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class Here:
    """Calls in this process, for debuggers and profilers: what raises is caught, a crash is everyone's."""

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error) -> None:
        pass

    def call(self, function: Callable, *arguments: Any, say: Callable[[str], None] = _ignore) -> Any:
        turns = [""]
        try:
            return function(Watch(say, turns.append), *arguments)
        except Exception as error:
            raise Lost("failed", describe(error), turns[-1]) from error
