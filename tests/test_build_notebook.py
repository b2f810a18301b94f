import json
import re
import signal
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, run_notebook

import build_notebook as builder


def test_the_committed_notebook_is_what_the_scripts_give():
    done = subprocess.run([sys.executable, "build_notebook.py", "check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_building_twice_gives_the_same_bytes(project):
    first = builder.NOTEBOOK.read_bytes()
    builder.build()
    assert builder.NOTEBOOK.read_bytes() == first


def test_one_changed_character_makes_the_notebook_stale_and_the_difference_is_shown(project):
    builder.check()
    file = project / "kaggle_cells" / "cell_06_loss_and_utils.py"
    file.write_text(
        file.read_text(encoding="utf-8").replace("gamma: float = 2.0", "gamma: float = 3.0"), encoding="utf-8"
    )
    with pytest.raises(builder.Failure, match=r"(?s)-.*gamma: float = 2\.0.*\+.*gamma: float = 3\.0"):
        builder.check()
    builder.NOTEBOOK.unlink()
    with pytest.raises(builder.Failure, match="is missing"):
        builder.check()


def test_the_notebook_is_valid_clean_and_every_cell_knows_its_file(project):
    notebook = nbformat.read(builder.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    files = [cell.metadata[builder.SOURCE_KEY] for cell in notebook.cells]
    assert list(dict.fromkeys(files)) == sorted(
        {f"kaggle_cells/{p.name}" for p in (ROOT / "kaggle_cells").glob("*.py")}
    )
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1 and parameters[0].source.count("EPOCHS: int = 25") == 1


def test_the_first_code_of_cell_2_are_the_parameters():
    notebook = builder.assemble()
    second = [c for c in notebook.cells if "cell_02" in c.metadata[builder.SOURCE_KEY] and c.cell_type == "code"]
    assert second[0].metadata.tags == ["parameters"]


def test_the_table_of_contents_leads_to_every_section():
    texts = [cell.source for cell in builder.assemble().cells if cell.cell_type == "markdown"]
    listed = dict(re.findall(r"^\| \[(.+)\]\(#([\w-]+)\) \|", texts[0], flags=re.M))
    there = {}
    for text in texts[1:]:
        there |= {title: anchor for anchor, title in re.findall(r'^<a id="([\w-]+)"></a>\n## (.+)$', text, flags=re.M)}
    assert list(listed.items()) == list(there.items()) and len(listed) == 14


@pytest.mark.parametrize("name", ["ci", "demo", "t4x2"])
def test_the_parameter_sets_name_real_parameters_with_valid_values(name):
    import dataclasses

    from cell_02_global_config import CONFIG

    known = builder.known_parameters(builder.assemble())
    dataclasses.replace(CONFIG, **builder.read_parameters(name, [], known))


def test_overrides_are_typed_and_unknown_names_are_errors(tmp_path):
    (empty := tmp_path / "empty.yaml").touch()
    known = {"EPOCHS": "int", "DATA_DIR": "str", "METHODS": "list"}
    found = builder.read_parameters(str(empty), [["EPOCHS", "3"], ["METHODS", "[a, b]"], ["DATA_DIR", "2024"]], known)
    assert found == {"EPOCHS": 3, "METHODS": ["a", "b"], "DATA_DIR": "2024"}
    with pytest.raises(builder.Failure, match="EPOCH is no parameter; is it EPOCHS"):
        builder.read_parameters(str(empty), [["EPOCH", "3"]], known)
    with pytest.raises(builder.Failure, match="neither a parameter set .*ci, demo, t4x2"):
        builder.read_parameters("dmeo", [], known)


def test_plain_papermill_stops_at_a_name_that_is_no_parameter(tmp_path):
    command = [sys.executable, "-m", "papermill", str(builder.NOTEBOOK), "out.ipynb", "-p", "EPOCH", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "EPOCH is no parameter; is it EPOCHS?" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_failing_cell_ends_the_run_with_its_error_and_its_file_and_how_to_go_on(tmp_path):
    folder, wrong = tmp_path / "run", ("-p", "DATA_DIR", str(tmp_path / "nowhere"))
    failed = run_notebook(folder, "ci", *wrong, expect=1)
    assert (
        "FileNotFoundError: DATA_DIR" in failed.output and "kaggle_cells/cell_09_data_preparation.py" in failed.output
    )
    kept = nbformat.read(folder / "deepfake_detection.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in kept.cells)
    assert failed.output.rstrip().endswith(f"--output {folder}")


def test_a_failing_run_leaves_the_notebook_of_an_earlier_one(tmp_path):
    earlier = tmp_path / "run" / "deepfake_detection.ipynb"
    earlier.parent.mkdir()
    earlier.write_text("with all its figures")
    failed = run_notebook(earlier.parent, "ci", "-p", "DATA_DIR", str(tmp_path / "nowhere"), expect=1)
    assert earlier.read_text() == "with all its figures" and "deepfake_detection.unfinished.ipynb" in failed.output


def test_a_folder_given_twice_is_an_error(tmp_path):
    failed = run_notebook(tmp_path / "run", "ci", "-p", "WORK_DIR", "elsewhere", expect=1)
    assert "both name the run's folder" in failed.output


def test_a_stopped_run_says_how_to_go_on(tmp_path):
    command = [sys.executable, str(ROOT / "build_notebook.py"), "run", "ci", "--output", str(tmp_path / "run")]
    listening = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # even if run in the background
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = subprocess.Popen(command, cwd=tmp_path, **pipes, **listening)
    for line in running.stdout:
        if line.startswith("Making a demo set"):
            break
    running.send_signal(signal.SIGINT)
    rest = running.stdout.read()
    assert (
        running.wait() == 1
        and f"Stopped. To go on, with what was wrong put right, run the same again with --output {tmp_path}" in rest
    )


def test_kernel_metadata_is_ready_for_kaggle():
    metadata = json.loads((ROOT / "notebooks" / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert (ROOT / "notebooks" / metadata["code_file"]).exists()
    assert metadata["enable_gpu"] is True and metadata["enable_internet"] is True
    assert metadata["machine_shape"] == "NvidiaTeslaT4" and metadata["dataset_sources"] == ["xdxd003/ff-c23"]
    assert re.fullmatch(r"[^/]+/[a-z0-9-]+", metadata["id"]) and metadata["kernel_type"] == "notebook"
