import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import processes
import pytest
from conftest import run_notebook
from processes import ROOT

import build_notebook as builder
from cell_06_loss_and_utils import save_checkpoint
from cell_08_evaluation_functions import Predictor


def test_the_committed_notebook_is_what_the_scripts_give():
    assert "is up to date" in processes.run([ROOT / "build_notebook.py", "check"], ROOT)


def test_building_twice_gives_the_same_bytes(project):
    first = builder.NOTEBOOK.read_bytes()
    builder.build()
    assert builder.NOTEBOOK.read_bytes() == first


def test_one_changed_character_makes_the_notebook_stale_and_the_difference_is_shown(project):
    builder.check()
    file = project / "kaggle_cells" / "cell_06_loss_and_utils.py"
    file.write_text(
        file.read_text(encoding="utf-8").replace("gamma: float = 2.0", "gamma: float = 3.0"),
        encoding="utf-8",
    )
    with pytest.raises(
        builder.Failure, match=r"(?s)-.*gamma: float = 2\.0.*\+.*gamma: float = 3\.0"
    ):
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
    second = [
        c
        for c in notebook.cells
        if "cell_02" in c.metadata[builder.SOURCE_KEY] and c.cell_type == "code"
    ]
    assert second[0].metadata.tags == ["parameters"]


def test_the_table_of_contents_leads_to_every_section():
    texts = [cell.source for cell in builder.assemble().cells if cell.cell_type == "markdown"]
    listed = dict(re.findall(r"^\| \[(.+)\]\(#([\w-]+)\) \|", texts[0], flags=re.M))
    there = {}
    for text in texts[1:]:
        there |= {
            title: anchor
            for anchor, title in re.findall(r'^<a id="([\w-]+)"></a>\n## (.+)$', text, flags=re.M)
        }
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
    found = builder.read_parameters(
        str(empty), [["EPOCHS", "3"], ["METHODS", "[a, b]"], ["DATA_DIR", "2024"]], known
    )
    assert found == {"EPOCHS": 3, "METHODS": ["a", "b"], "DATA_DIR": "2024"}
    with pytest.raises(builder.Failure, match="EPOCH is not a parameter; did you mean EPOCHS"):
        builder.read_parameters(str(empty), [["EPOCH", "3"]], known)
    with pytest.raises(
        builder.Failure, match="neither a parameter set .*ci, demo, finetune, frames, t4x2"
    ):
        builder.read_parameters("dmeo", [], known)


@pytest.mark.slow
def test_plain_papermill_stops_at_a_name_that_is_not_a_parameter(tmp_path):
    words = [sys.executable, "-m", "papermill", builder.NOTEBOOK, "out.ipynb", "-p", "EPOCH", "3"]
    assert "EPOCH is not a parameter; did you mean EPOCHS?" in processes.command(
        words, tmp_path, expect=1
    )
    assert not (tmp_path / "data").exists()


def test_a_failing_cell_ends_the_run_with_its_error_its_file_and_how_to_resume(failed_run):
    assert "not a torchvision classification model; try resnet50" in failed_run.output
    assert "kaggle_cells/cell_02_global_config.py" in failed_run.output
    assert failed_run.output.rstrip().endswith(f"--output {failed_run.folder}")


def test_a_failing_run_keeps_what_it_showed_beside_the_notebook_of_an_earlier_one(failed_run):
    kept = nbformat.read(failed_run.folder / "deepfake_detection.unfinished.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in kept.cells)
    assert (failed_run.folder / "deepfake_detection.ipynb").read_text() == "with all its figures"


def test_a_folder_given_twice_is_an_error(tmp_path):
    failed = run_notebook(tmp_path / "run", "ci", "-p", "WORK_DIR", "elsewhere", expect=1)
    assert "both name the run's folder" in failed.output


def test_a_stopped_run_says_how_to_resume(tmp_path):
    words = [ROOT / "build_notebook.py", "run", "ci", "--output", tmp_path / "run"]
    running = processes.Program(words, tmp_path / "elsewhere")
    notebook = tmp_path / "run" / "deepfake_detection.ipynb"
    while running.is_running and not (
        notebook.exists() and '"execution_count": 1,' in notebook.read_text(encoding="utf-8")
    ):
        time.sleep(0.05)
    running.interrupt()
    assert running.wait(60) == 1
    advice = "Stopped. To resume, run the same command with --output"
    assert f"{advice} {tmp_path / 'run'}" in running.output


def test_kernel_metadata_is_ready_for_kaggle():
    """What Kaggle's API checks, and what the notebook and the README tell users to choose."""
    metadata = json.loads((ROOT / "notebooks" / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert (ROOT / "notebooks" / metadata["code_file"]).exists()
    assert (
        re.fullmatch(r"[^/]+/[a-z0-9-]{5,50}", metadata["id"])
        and metadata["kernel_type"] == "notebook"
    )
    assert metadata["language"] == "python" and metadata["enable_gpu"] is True
    first_cell, readme = (
        builder.assemble().cells[0].source,
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    assert metadata["dataset_sources"]
    assert all(source in first_cell and source in readme for source in metadata["dataset_sources"])


def test_score_says_of_videos_and_folders_whether_they_are_fake(finished_run, demo_set, tmp_path):
    model, video = finished_run.folder / "models" / "best_model.pth", demo_set / "real" / "0001.mp4"
    (tmp_path / "broken.mp4").write_text("no video")
    words = [ROOT / "build_notebook.py", "score", "--model", model]
    listed = tmp_path / "list.txt"
    listed.write_text(f"{video}\n\nbroken.mp4\n")
    into = ["--output", tmp_path / "out"]
    text = processes.run([*words, listed, video, tmp_path, *into], tmp_path)
    *_, scored, broken, _, summary = text.strip().splitlines()  # each once
    probability, verdict, path = scored.split()[:3]
    assert 0 < float(probability) < 1 and verdict in ("real", "fake", "uncertain")
    assert path == f"{video}," and "AUC" in text
    assert "error" in broken and "broken.mp4 (no frames can be decoded" in broken
    assert "1 not readable" in summary and (tmp_path / "out" / "report.html").exists()
    pretrained = processes.run([*words[:2], video, *into], tmp_path)
    assert "It is weak" in pretrained and "otherwise uncertain" in pretrained
    missing = processes.run([*words, "nowhere.mp4"], tmp_path, expect=1)
    assert "nowhere.mp4 does not exist" in missing
    no_model = processes.run([*words[:2], video, "--model", "none.pth"], tmp_path, expect=1)
    assert "none.pth does not exist" in no_model and "run trains one" in no_model


def test_verdicts_in_a_log_stand_alone(monkeypatch, capsys):
    """Writing above a bar draws all bars again: where lines stand for them, more lines."""
    from cell_01_imports_and_setup import progress_bar
    from cell_08_evaluation_functions import Judgement

    monkeypatch.delenv("TQDM_DISABLE")
    with progress_bar(title="your videos", total=10) as bar:
        bar.update(5)
        builder.print_verdict(Judgement("a.mp4", "real", 0.1, 1, 0.0, 8.0))
    assert capsys.readouterr().out == "0.100  real        a.mp4, face 1, 0 to 8 s\n"


def test_score_needs_something_to_score_and_a_model(tmp_path):
    with pytest.raises(builder.Failure, match="no videos or pictures in"):
        builder.videos_in([tmp_path])
    (tmp_path / "notes.pth").write_text("hello world")
    save_checkpoint(tmp_path / "last_checkpoint.pth", {"model": {}, "epoch": 1})
    for name in ("notes.pth", "last_checkpoint.pth"):
        with pytest.raises(builder.Failure, match=f"{name} is not a model file"):
            builder.load_predictor(tmp_path / name)
    (tmp_path / "face.png").touch()
    (tmp_path / "video.mp4").touch()
    assert builder.videos_in([tmp_path]) == [tmp_path / "face.png", tmp_path / "video.mp4"]
    with pytest.raises(ValueError):
        builder.whole("-1")


def test_the_pretrained_detector_is_what_its_card_says():
    card = (builder.PRETRAINED.parent / "README.md").read_text(encoding="utf-8")
    predictor = Predictor.load(builder.PRETRAINED)
    settings, limits = predictor.settings, predictor.limits
    assert f"the mean of {settings.frames} frames a window; face crops of {settings.size}" in card
    assert f"a margin of {settings.margin}" in card and f"*real* up to {limits[0]:.2f}," in card
    assert "It never says *fake*" in card and limits[1] > 1
    assert f"temperature {predictor.temperature:.2f}" in card
    assert builder.PRETRAINED.stat().st_size < 15e6


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """A model file with random weights."""
    from cell_02_global_config import CONFIG
    from cell_05_model_definition import build_model
    from cell_06_loss_and_utils import model_file

    small: Any = dict(BACKBONE="resnet18", IMAGE_SIZE=64, FRAMES_PER_VIDEO=4, LSTM_HIDDEN=8)
    config = dataclasses.replace(CONFIG, **small, CLIPS_PER_VIDEO=1)
    calibration = {"temperature": 1.0, "offset": 0.0, "threshold": 0.5}
    calibration |= {"sure_real": 0.4, "sure_fake": 0.6}
    row = {"epoch": 1, "val_auc": 0.5, "val_loss": 0.7}
    file = tmp_path_factory.mktemp("model") / "model.pth"
    save_checkpoint(file, model_file(build_model(config), config, calibration, ["x"], row))
    return file


@pytest.mark.slow
def test_a_folder_of_200_is_scored_though_it_is_killed_twice(small_model, demo_set, tmp_path):
    files = sorted(demo_set.glob("*/*.mp4"))
    for number in range(200):
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{number:03}.mp4").write_bytes(files[number % 24].read_bytes())
    words = [ROOT / "build_notebook.py", "score", tmp_path / "videos", "--model", small_model]
    words, judged = [*words, "--output", tmp_path / "out"], tmp_path / "out" / "judged"
    for wanted in (10, 30):
        program = processes.Program(words, tmp_path)
        while program.is_running and len([*judged.glob("*.json")]) < wanted:
            time.sleep(0.1)
        program.kill()
    kept = {file: file.stat().st_mtime_ns for file in judged.glob("*.json")}
    interrupted = processes.Program(words, tmp_path)
    while interrupted.is_running and len([*judged.glob("*.json")]) < 50:
        time.sleep(0.1)
    interrupted.interrupt()
    assert interrupted.wait() == 130 and "the same command goes on" in interrupted.output
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) >= 50
    text = processes.run(words, tmp_path)
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 201
    assert len(kept) >= 30 and "report.html" in text.splitlines()[-1]
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


@pytest.mark.slow
def test_the_app_judges_a_video_and_stays_up(small_model, demo_set, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    words = [ROOT / "build_notebook.py", "app", "--model", small_model, "--max-size", "1"]
    server = processes.Program([*words, "--port", 7917], tmp_path)
    while server.is_running and "Running on" not in server.output:
        time.sleep(0.2)
    assert "http://127.0.0.1:7917" in server.output
    (tmp_path / "broken.mp4").write_text("no video")
    (tmp_path / "large.mp4").write_bytes(bytes(2 * 10**6))
    video, browser_file = demo_set / "real" / "0001.mp4", shutil.which("chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 390, "height": 800})
        view.goto("http://127.0.0.1:7917")
        for files, answer in [
            ([video], "P(fake)"),
            ([tmp_path / "broken.mp4"], "cannot be judged: no frames can be decoded"),
            ([tmp_path / "large.mp4"], "exceed the maximum allowed size"),
            ([video] * 10, "10 files at once are too many"),
            ([video], "P(fake)"),
        ]:
            view.locator("input[type=file]").wait_for(state="attached")
            view.set_input_files("input[type=file]", files)
            view.get_by_text(answer).first.wait_for(timeout=60000)
            view.get_by_text("Drop a video here").first.wait_for()
            view.wait_for_timeout(1000)
        assert view.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    server.kill()
