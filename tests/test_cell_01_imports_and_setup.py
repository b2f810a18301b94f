import pytest
import torch

import cell_01_imports_and_setup as cell


def test_a_gpu_that_cannot_compute_becomes_advice_and_the_run_goes_on_on_the_cpu(monkeypatch):
    def no_kernels(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", no_kernels)
    environment = cell.probe_environment()
    assert environment.device == "cpu" and environment.gpus == ()
    assert "P100" in environment.advice[0] and "GPU T4 x2" in environment.advice[0]


def test_the_environment_tells_the_versions_of_what_is_installed():
    environment = cell.probe_environment()
    assert environment.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "not installed" not in environment.versions.values()
    assert environment.ram_gib > 0.5 and environment.cpu_cores >= 1


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(ImportError, match=r"pip install --no-deps no-such-package==1.0"):
        cell.ensure_package("no_such_package", "no-such-package==1.0")


def test_the_bridge_finds_names_of_main_and_otherwise_names_the_cell_to_run(monkeypatch):
    import __main__

    bridge = cell.NotebookCell("cell_04_dataset_class")
    monkeypatch.setattr(__main__, "ClipDataset", "defined", raising=False)
    assert bridge.ClipDataset == "defined"
    with pytest.raises(ImportError, match="run cell_04_dataset_class first"):
        _ = bridge.not_yet_defined


def test_the_list_of_cells_is_the_folder():
    from conftest import ROOT

    assert tuple(sorted(file.stem for file in (ROOT / "kaggle_cells").glob("cell_*.py"))) == cell.CELLS
