"""Python programs in processes of their own that do not have to import the libraries again.

A server process imports what comes from PyPI, never the cells, and forks itself for each program.
Such a process starts in a few hundredths of a second instead of five, has its own memory, and can
be killed.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = [
    "torch", "torchvision", "cv2", "pandas", "matplotlib.pyplot", "seaborn", "sklearn.metrics",
    "sklearn.linear_model", "scipy.optimize", "scipy.stats", "facenet_pytorch", "IPython.display",
    "tqdm.auto", "psutil", "yaml", "papermill", "jupytext",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)


def become(
    arguments: Sequence[str], folder: str, environment: Mapping[str, str], output: str
) -> None:
    """Turn the process that the server has just forked into `python ARGUMENTS` in a folder.

    With the variable UNDRAWN, figures are made but not drawn, which takes the longest of them.
    """
    os.setsid()  # a group of its own, which can be killed as a whole
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    warnings.resetwarnings()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
    own = {str(ROOT), str(ROOT / "tests"), str(ROOT / "kaggle_cells"), ""}
    sys.path[:] = [
        str(Path(arguments[0]).parent),
        *(place for place in sys.path if place not in own),
    ]
    sys.path[1:1] = [
        place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place
    ]
    sys.argv[:] = arguments
    if "UNDRAWN" in environment:
        from matplotlib.figure import Figure

        Figure.savefig = lambda self, file, **_: Path(file).write_bytes(b"undrawn")  # type: ignore
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Program:
    """A Python program that runs. Its output goes to a file beside the folder it runs in."""

    def __init__(self, arguments: Sequence[object], folder: Path, **environment: Any) -> None:
        words = [str(word) for word in arguments]
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder.parent / f".{folder.name}-{os.urandom(4).hex()}.txt"
        variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        self.process = SERVER.Process(
            target=become, args=(words, str(folder), variables, str(self.file))
        )
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        """What the program has printed so far."""
        return self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    @property
    def status(self) -> int | None:
        """The exit status, None while it runs; -9 for a program that was killed."""
        return self.process.exitcode

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """End the program and what it started, in the middle of whatever they do."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.killpg(self.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, seconds: float = 240) -> int | None:
        """The exit status. A program that takes too long is killed and fails the test."""
        try:
            self.process.join(seconds)
            if self.is_running:
                pytest.fail(f"still running after {seconds} s. It had printed:\n{self.output}")
        finally:
            if self.is_running:  # too slow, or the whole test was
                self.kill()
                print(self.output)
        return self.status


def run(arguments: Sequence[object], folder: Path, expect: int = 0, **environment: Any) -> str:
    """Run a program to its end, with variables in its environment; returns what it printed."""
    program = Program(arguments, folder, **environment)
    status = program.wait()
    assert status == expect, f"exit status {status}\n{program.output}"
    return program.output


def command(arguments: Sequence[object], folder: Path, expect: int = 0, **environment: Any) -> str:
    """Run any command to its end, a real one and not a fork; returns what it printed."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    words, output = [str(word) for word in arguments], folder / ".output.txt"
    with output.open("w+") as stream:
        try:
            done = subprocess.run(
                words, cwd=folder, env=variables, stdout=stream, stderr=stream, timeout=240
            )
        finally:
            stream.seek(0)
            print(text := stream.read())  # pytest shows it where the test fails
    assert done.returncode == expect
    return text
