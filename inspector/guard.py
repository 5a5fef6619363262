"""A command in a process of its own, so that a library that crashes ends with two lines.

Python cannot catch what aborts or kills its process, and files from outside bring native libraries
to that. Here the process that the user started waits for a copy of itself that does the work. A
separate module because it has to be loaded before anything heavy, and knows nothing of commands.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

CRASHED = 2
_CRASHES = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGKILL", "SIGSEGV", "SIGTRAP")


def guarded(command: Callable[[], int], say: Callable[[str, str], None]) -> int:
    """The exit code of a command that runs in a child process; 2 where that crashes.

    Signals that somebody sends to this process are handed on; what a terminal sends (Ctrl-C), both
    processes get by themselves. Where the platform cannot fork or wait for signals, the command
    runs in this process.

    Args:
        command: what to run; gives its exit code.
        say: shows a line, given its kind ("error", "hint") and text.
    """
    if not hasattr(os, "fork") or not hasattr(signal, "sigwaitinfo"):
        return command()
    handed_on = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*handed_on, signal.SIGCHLD})
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return command()
    while True:
        sent = signal.sigwaitinfo({*handed_on, signal.SIGCHLD})
        if sent.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
        elif sent.si_code <= 0:  # sent by a process, not by the terminal
            os.kill(child, sent.si_signo)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if name not in _CRASHES:
        return 128 - code  # as shells say it
    short = "; out of memory is a usual reason" if name == "SIGKILL" else ""
    say("error", f"a library crashed on these files and was ended by {name}{short}")
    say("hint", "Check the files with another tool, or export the model again.")
    return CRASHED
