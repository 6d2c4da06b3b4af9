"""Being asked to stop: Ctrl-C, and what clusters send before they take the machine away, in every command.

The first SIGINT, SIGTERM or SIGUSR1 ends a command in one line: `Stopped` is raised in the main thread, so that what is
half written is removed on the way out, or, within `politely` (the training loop), it is noted for the loop to answer
between two batches. A second Ctrl-C leaves at once. Python runs its handlers in the main thread between two
instructions: one that waits in C for another process, a compiler or a disk would hear nothing. So a thread listens on
the file that the interpreter writes each signal's number to, and ends the process where the main thread does not.

Exit status: 75 (EX_TEMPFAIL of sysexits.h, try again) after SIGTERM and SIGUSR1, which come from machines that mean to
start it again; 130 after Ctrl-C, as shells expect it: a loop that restarts on 75 is not to bring back what a person
ended.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TRY_AGAIN = 75
INTERRUPTED = 130
GRACE = 10.0  # seconds that the main thread has to come out of what it does, where nothing waits to be saved
SAME = 1.0  # torchrun hands a Ctrl-C on that the terminal may have sent already: within so many seconds it is one


class Stopped(KeyboardInterrupt):
    """This command was asked to stop; `by` names the signal. Not an Exception, which somebody might handle."""

    def __init__(self, by: str):
        super().__init__(by)
        self.by = by


def exit_status(by: str) -> int:
    """by: the signal's name, perhaps with the process that got it behind."""
    return INTERRUPTED if by.startswith("SIGINT") else TRY_AGAIN


def say_and_leave(text: str, status: int) -> NoReturn:
    """From any thread, whatever the others do."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        if text:
            print(text, file=sys.stderr)
        sys.stderr.flush()
    os._exit(status)


class Signals:
    """A context: while it is entered, this process answers the signals. program, again: for the line that says so."""

    def __init__(self, program: str, again: str, stays: bool = False):
        """stays: the process ends with the context, and is not to be interrupted while it does."""
        self.program, self.again, self.stays = program, again, stays
        self.asked: str | None = None  # by which signal
        self.since = 0.0  # when it was, or when the training loop was left after it
        self.raised = False  # Stopped was: whatever comes out of the command then follows from it
        self._polite = self._over = False
        self._interrupted: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        global CURRENT
        self._outer, CURRENT = CURRENT, self
        if threading.current_thread() is not threading.main_thread():
            return self
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._before_fd = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._answer) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._heard,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        global CURRENT
        self._over = True
        if self.stays:
            return
        CURRENT = self._outer
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before_fd)
            os.close(self._told)  # the thread that listens ends

    @contextlib.contextmanager
    def politely(self) -> Iterator[None]:
        """Within the block a signal is only noted in `asked`; what nobody answered there is raised at its end."""
        outer, self._polite = self._polite, True
        failed = True
        try:
            yield
            failed = False
        finally:
            self._polite = outer
            if self.asked:
                self.since = time.monotonic()
        if self.asked and not failed and not outer and not self.raised:
            self._raise()

    def _answer(self, number: int, _frame) -> None:
        self._note(number)
        if not (self._polite or self._over or self.raised):
            self._raise()

    def _raise(self) -> NoReturn:
        self.raised = True
        raise Stopped(self.asked)

    def _note(self, number: int) -> None:
        if self.asked is None:
            self.since = time.monotonic()
            self.asked = signal.Signals(number).name

    def _listen(self, heard: int) -> None:
        while True:
            if select.select([heard], [], [], 0.5)[0]:
                numbers = os.read(heard, 64)
                if not numbers:
                    os.close(heard)
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self._hear(number)
            if self.asked and not self._polite and not self._over and time.monotonic() - self.since > GRACE:
                say_and_leave(self.line(self.asked), exit_status(self.asked))

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = now
                if self._polite and _first_process():
                    sys.stderr.write("\nstopping after this step, with a checkpoint; Ctrl-C again leaves at once\n")
            elif not _under_torchrun() or now - self._interrupted > SAME:
                say_and_leave(f"{self.program}: left at once; {self.again}" * _first_process(), INTERRUPTED)
        self._note(number)

    def line(self, by: str) -> str:
        """What is said of it: on one of several processes, nothing on the others."""
        return f"{self.program}: stopped by {by}; {self.again}" if _first_process() else ""


CURRENT: Signals | None = None  # what answers in this process


def asked() -> str | None:
    """The signal that asked this process to stop."""
    return CURRENT.asked if CURRENT else None


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _forget() -> None:
    """A forked child is another program: what it is sent is not this command's."""
    global CURRENT
    if CURRENT is not None and CURRENT._before:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    CURRENT = None


os.register_at_fork(after_in_child=_forget)
