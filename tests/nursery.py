"""A process that has imported what takes long, and forks for each piece of code it is sent.

To import torch and numba takes longer than most of these pieces. fastopt itself is imported by
each of them anew, as it may be a copy of the package.

    python -c "import nursery; nursery.serve()"

reads lines of JSON, `bear`'s arguments by name, and answers each with the child's exit status.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from typing import NoReturn


def bear(code: str, path: list[str], env: dict[str, str], stdout: str, stderr: str) -> NoReturn:
    """Run code as `python -c` would, its output in two files, and end this process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.setpgid(0, 0)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = path
    status = 1
    try:
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Until standard input ends."""
    for name in ("numba.extending", "pytest", "torch._dynamo"):
        importlib.import_module(name)

    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.pop("seconds")
        child = os.fork()
        if child == 0:
            bear(**request)

        def kill(*_: object, group: int = child) -> None:
            os.killpg(group, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.alarm(seconds)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.alarm(0)
        print(status, flush=True)
