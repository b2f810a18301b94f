"""The programs that tests start: fresh, isolated from the tests, and never running for ever."""

import time

import processes
import psutil
import pytest
from conftest import program_file, run_program


def test_a_program_starts_without_the_cells_and_leaves_nothing_behind(tmp_path):
    program = """
import cell_02_global_config as cell
print([name for name in before if name.startswith("cell_")], cell.CONFIG.EPOCHS, os.environ["MARK"])
cell.left_behind = os.environ["LEFT"] = "something"
"""
    file = program_file(
        tmp_path, f"before = list(sys.modules)\n{program}assert 'LEFT' not in dict(environment)\n"
    )
    file.write_text(
        file.read_text().replace(
            "import os, ", "import os; environment = dict(os.environ); import "
        )
    )
    for epochs in (3, 4):
        printed = processes.run([file], tmp_path, DEEPFAKE_EPOCHS=epochs, MARK=f"mark {epochs}")
        assert printed == f"[] {epochs} mark {epochs}\n"


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_program_that_hangs_is_killed_with_all_it_started_and_its_output_shown(tmp_path):
    program = "import subprocess, time\nprint('about to hang', flush=True)\n"
    program += "print(subprocess.Popen(['sleep', '300']).pid, flush=True)\ntime.sleep(300)"
    running = processes.Program([program_file(tmp_path, program)], tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)still running after 2 s.*about to hang"):
        running.wait(seconds=2)
    child, until = int(running.output.split()[-1]), time.monotonic() + 5
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(child), "what the program had started still runs"
    assert running.status == -9


def test_a_program_that_fails_shows_why(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)exit status 1.*ZeroDivisionError"):
        run_program("1 / 0", tmp_path)
