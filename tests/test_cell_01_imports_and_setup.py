import ast
import dataclasses
import re
import runpy
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT

import cell_01_imports_and_setup as cell


def test_a_gpu_that_cannot_compute_becomes_advice_and_the_run_goes_on_on_the_cpu(
    monkeypatch, capsys
):
    def no_kernels(*_, **__):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nmore lines"
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", no_kernels)
    monkeypatch.setattr(sys, "argv", ["kaggle_cells/cell_12_training_loop.py"])
    runpy.run_path(cell.__file__)  # no traceback
    said = re.search("Note: GPU 0 .*", capsys.readouterr().out)[0]
    assert (
        "Tesla P100-PCIE-16GB" in said
        and "no kernel image" in said
        and "Accelerator > GPU T4 x2" in said
    )
    assert cell.probe_environment().device == "cpu" and cell.probe_environment().gpus == ()


def test_a_torch_without_cuda_beside_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cell.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "is built for CPUs only" in cell.probe_gpus()[1][0]


def test_on_kaggle_without_an_accelerator_the_menu_is_named(monkeypatch):
    monkeypatch.setattr(cell, "ON_KAGGLE", True)
    assert "Settings > Accelerator > GPU T4 x2" in cell.probe_gpus()[1][-1]


def test_the_environment_tells_the_versions_of_what_is_installed():
    environment = cell.probe_environment()
    assert environment.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {*cell.REQUIREMENTS, "python"} == set(environment.versions)
    assert "not installed" not in environment.versions.values()
    assert environment.ram_gib > 0.5 and environment.cpu_cores >= 1


def test_the_table_is_compact_and_holds_what_matters():
    t4s = dict(
        machine="Kaggle", interactive=False, gpus=("Tesla T4", "Tesla T4"), gpu_gib=(14.7, 14.7)
    )
    table = cell.environment_table(
        dataclasses.replace(cell.ENVIRONMENT, **t4s, precision="fp16", internet=False)
    )
    shown = table["environment"]
    assert list(table.index)[:3] == ["machine", "GPU", "precision"]
    assert len(table) < 15 and shown["machine"] == "Kaggle, unattended"
    assert shown["GPU"] == "2 x Tesla T4, 15 GiB" and shown["precision"] == "fp16"
    assert shown["internet"] == "not reachable" and str(Path.cwd()) in shown["free disk"]


@pytest.mark.parametrize(("run_type", "interactive"), [("Batch", False), ("Interactive", True)])
def test_kaggle_says_whether_somebody_looks_on(monkeypatch, run_type, interactive):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", run_type)
    assert cell.is_interactive() is interactive


def test_the_internet_is_asked_for_no_longer_than_it_may_take(monkeypatch):
    def unresolved(*_, **__):
        time.sleep(20)
        raise OSError("a name that nobody resolves")

    monkeypatch.setattr(cell.urllib.request, "urlopen", unresolved)
    started = time.monotonic()
    assert not cell.internet_is_reachable(0.5) and time.monotonic() - started < 5
    monkeypatch.undo()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(cell.urllib.request, "_opener", None)  # it remembers the proxies of before
    assert not cell.internet_is_reachable()


def test_missing_packages_are_named_together_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(
        cell,
        "REQUIREMENTS",
        {"no_such": "no-such>=1.0", "nor_this": "nor-this==2", "torch": "torch"},
    )
    with pytest.raises(
        ImportError,
        match=r'no_such, nor_this .*python -m pip install "no-such>=1.0" "nor-this==2"$',
    ):
        cell.ensure_packages("no_such", "torch", "nor_this")


def test_on_kaggle_a_package_that_cannot_be_had_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(cell, "ON_KAGGLE", True)
    monkeypatch.setattr(cell, "REQUIREMENTS", {"no_such": "no-such-package==1.0"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ImportError,
        match=r"no_such could not be installed \(.*no-such-package.*\)\. Turn on Settings",
    ):
        cell.ensure_packages("no_such")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (48.2, "48 s"),
        (59.7, "1 min"),
        (414, "6 min 54 s"),
        (5520, "1 h 32 min"),
        (39600, "11 h"),
    ],
)
def test_times_are_for_people(seconds, words):
    assert cell.duration(seconds) == words


def test_sizes_are_for_people():
    assert [cell.file_size(size) for size in (0, 1, 1025, 46_242_201)] == [
        "0 KiB",
        "1 KiB",
        "2 KiB",
        "44.1 MiB",
    ]


def test_the_bridge_finds_names_of_main_and_otherwise_names_the_cell_to_run(monkeypatch):
    import __main__

    bridge = cell.NotebookCell("cell_04_dataset_class")
    monkeypatch.setattr(__main__, "ClipDataset", "defined", raising=False)
    assert bridge.ClipDataset == "defined"
    with pytest.raises(ImportError, match="run cell_04_dataset_class first"):
        _ = bridge.not_yet_defined


def test_the_list_of_cells_is_the_folder():
    assert sorted(file.stem for file in (ROOT / "kaggle_cells").glob("cell_*.py")) == cell.CELLS


def imported(files: Iterable[Path]) -> set[str]:
    """The top-level modules that files import and that come neither from Python nor from here."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return {
        name for name in found if name not in sys.stdlib_module_names and name not in cell.CELLS
    }


def listed(file: str) -> set[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {line.split("#")[0].strip() for line in text.splitlines()} - {""}


def test_everything_imported_is_required():
    assert imported((ROOT / "kaggle_cells").glob("*.py")) <= set(cell.REQUIREMENTS)
    assert set(cell.REQUIREMENTS.values()) <= listed("requirements.txt")
    both = listed("requirements.txt") | listed("requirements-app.txt")
    names = {re.split("[=<>]", requirement)[0].lower() for requirement in both}
    builder = {name.lower() for name in imported([ROOT / "build_notebook.py"])}
    assert builder <= names | {"yaml", "cv2"}  # as PyYAML and opencv-python-headless


@pytest.mark.parametrize("interactive", [False, True])
def test_where_nobody_is_watching_a_line_now_and_then_stands_for_a_bar(
    monkeypatch, capsys, interactive
):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(cell, "LOG_INTERVAL", 0.2)
    monkeypatch.setattr(cell, "ENVIRONMENT", SimpleNamespace(interactive=interactive))
    with cell.progress_bar(title="epoch 3", total=40) as bar:
        for _ in range(35):
            time.sleep(0.02)
            bar.set_postfix({"loss": "0.512"}, refresh=False)
            bar.update()
    line = r"epoch 3: (\d+) %, .* passed, .* left, loss=0.512\n"
    shares = [int(share) for share in re.findall(line, capsys.readouterr().out)]
    assert (len(shares) >= 3) is not interactive and shares == sorted(shares)


def test_what_is_over_soon_prints_no_line(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(cell, "ENVIRONMENT", SimpleNamespace(interactive=False))
    assert [*cell.progress_bar(range(5), "making clips", 5)] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == ""
