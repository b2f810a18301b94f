"""The notebook, the pasted cells and the fourteen scripts: one text, three ways to run it."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import processes
import pytest
import torch
from conftest import CI_WITHOUT_ROBUSTNESS, Run, run_program, run_script
from processes import ROOT

from build_notebook import SOURCE_KEY

FILES = sorted((ROOT / "kaggle_cells").glob("cell_*.py"))
PROMISED = (
    "models/best_model.pth",
    "results/experiment_results.json",
    "results/experiment_report.txt",
    "results/training_history.csv",
    "results/test_predictions.csv",
    "results/training_history.png",
    "results/evaluation/confusion_matrix.png",
    "results/evaluation/roc_pr_curves.png",
    "results/evaluation/score_distribution.png",
    "results/evaluation/calibration.png",
    "results/evaluation/robustness.png",
    "results/evaluation/explanations.png",
    "results/evaluation/mistakes.png",
)


def pasted(texts: list[str], folder: Path, expect: int = 0) -> str:
    """Run texts as the cells of a fresh notebook, without a kernel; returns what they printed."""
    program = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for text in {texts!r}:
    if not shell.run_cell(text, store_history=True).success:
        raise SystemExit(1)
"""
    (folder / "notebook.py").write_text(program, encoding="utf-8")
    return processes.run([folder / "notebook.py"], folder, expect, UNDRAWN=1)


def edited(text: str, parameters: dict) -> str:
    """The parameters cell, edited by hand."""
    for name, value in parameters.items():
        text, count = re.subn(
            rf"^{name}: (\w+) = [^#\n]*", f"{name}: \\1 = {value!r}  ", text, flags=re.M
        )
        assert count == 1, name
    return text


# The assembled notebook


def test_the_notebook_ends_with_every_promised_file(finished_run):
    for name in PROMISED:
        assert (finished_run.folder / name).stat().st_size > 0, name
    for name in (
        "results/metrics_by_method.csv",
        "models/last_checkpoint.pth",
        "data/train.csv",
        "data/skipped.csv",
    ):
        assert (finished_run.folder / name).exists(), name
    assert not list(finished_run.folder.rglob(".partial-*"))


def test_the_run_says_where_to_look(finished_run):
    assert f"{finished_run.folder / 'deepfake_detection.ipynb'}" in finished_run.output
    assert "epoch  2" in finished_run.output


def test_the_executed_notebook_shows_its_figures_and_no_warnings(finished_run):
    notebook = nbformat.read(finished_run.folder / "deepfake_detection.ipynb", as_version=4)
    outputs, figures = [], Counter()
    for cell in notebook.cells:
        outputs += cell.get("outputs", [])
        section = Path(cell.metadata.get(SOURCE_KEY, "injected")).name[:7]
        figures[section] += sum("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
    expected = {"cell_06": 1, "cell_09": 1, "cell_10": 1, "cell_12": 1, "cell_13": 7}
    assert {section: figures[section] for section in expected} == expected
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert not any("%|" in str(output) for output in outputs), (
        "a progress bar, kept as it first appeared"
    )


def test_results_are_complete_and_valid_json(finished_run):
    results = finished_run.results
    json.dumps(results, allow_nan=False)
    assert (
        results["config"]["BACKBONE"] == CI_WITHOUT_ROBUSTNESS["BACKBONE"]
        and results["model"]["initial_weights"] == "random"
    )
    assert sum(n for split in results["data"]["videos"].values() for n in split.values()) == 24
    assert results["training"]["epochs"] == 2 and results["seconds"]["training"] > 0
    for metrics in results["metrics"].values():
        assert {"accuracy", "balanced_accuracy", "precision", "recall", "f1", "auc_roc"} < set(
            metrics
        )
        assert {
            "auc_pr",
            "eer",
            "tpr_at_1_fpr",
            "tpr_at_5_fpr",
            "specificity",
            "log_loss",
            "brier",
            "ece",
        } < set(metrics)
    for name, intervals in results["intervals"].items():
        for metric, (low, high) in intervals.items():
            value = results["metrics"][name][metric]
            assert value is None or low <= value <= high or metric == "ece", (name, metric)
    assert results["format"] == 2 and len(results["robustness"]) == 13
    assert results["model"]["trained_on"] == ["blend", "jitter", "lowres"]
    report = (finished_run.folder / "results" / "experiment_report.txt").read_text(encoding="utf-8")
    assert (
        f"{results['metrics']['at_fitted_threshold']['auc_roc']:.3f}" in report
        and "initial weights: random" in report
    )


def test_no_recording_crosses_a_split(finished_run):
    groups = [
        set(finished_run.table(f"data/{name}.csv").group) for name in ("train", "val", "test")
    ]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_the_history_has_a_row_an_epoch_and_the_model_is_that_of_the_best(finished_run):
    history = finished_run.table("results/training_history.csv")
    assert history.epoch.tolist() == [1, 2]
    saved = torch.load(finished_run.folder / "models" / "best_model.pth", weights_only=True)
    best = history[history.best].iloc[-1]
    assert saved["epoch"] == best.epoch and saved["val_auc"] == pytest.approx(best.val_auc)


def test_the_model_file_alone_gives_the_same_probabilities(finished_run, tmp_path):
    """In a fresh process, from the videos, with nothing but cells 1 to 5."""
    program = f"""
import csv
from pathlib import Path
import torch
from cell_03_data_processing import ClipSettings, load_face_detector, make_clip
from cell_04_dataset_class import normalize, to_float
from cell_05_model_definition import load_detector
from types import SimpleNamespace
run = Path({str(finished_run.folder)!r})
model, saved = load_detector(run / "models" / "best_model.pth")
settings, faces = ClipSettings.of(SimpleNamespace(**saved["config"])), load_face_detector("cpu")
for row in [*csv.DictReader(open(run / "results" / "test_predictions.csv"))][::2]:
    clip = make_clip(Path(row["path"]), settings, faces)
    with torch.no_grad():
        logit = model(normalize(to_float(torch.from_numpy(clip.frames)[None]))).logit
    chance = torch.sigmoid(logit / saved["temperature"]).item()
    assert abs(chance - float(row["probability"])) < 1e-4, (row["path"], chance, row["probability"])
    assert ("fake" if chance >= saved["threshold"] else "real") == row["verdict"]
    print(row["path"])
"""
    assert run_program(program, tmp_path).count(".mp4") == 3


def test_the_readmes_python_works_as_it_stands(finished_run, tmp_path):
    """Gathering the results of many runs, and scoring one video."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "MY_RUN").symlink_to(finished_run.folder)
    (tmp_path / "kaggle_cells").symlink_to(ROOT / "kaggle_cells")
    (tmp_path / "my_video.mp4").symlink_to(
        next((finished_run.folder / "demo_videos_42" / "fake").glob("*.mp4"))
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    printed = []
    for code in re.findall(r"^```python\n(.*?)^```", readme, flags=re.M | re.S):
        (tmp_path / "readme.py").write_text(code, encoding="utf-8")
        printed.append(processes.run([tmp_path / "readme.py"], tmp_path))
    auc = finished_run.results["metrics"]["at_fitted_threshold"]["auc_roc"]
    assert re.search("^(fake|real|uncertain) 0[.]", printed[0]) and len(printed) == 2
    assert CI_WITHOUT_ROBUSTNESS["BACKBONE"] in printed[1] and f"{auc:.3f}" in printed[1]


# Pasted, and as scripts


@pytest.fixture(scope="module")
def shared(its_clips):
    """Parameters for further runs on the same videos and clips."""
    return {**CI_WITHOUT_ROBUSTNESS, **its_clips}


def same_results(first: Run, second: Run) -> None:
    assert first.results["metrics"] == second.results["metrics"]
    history = [
        run.table("results/training_history.csv").drop(columns=["seconds", "clips_per_second"])
        for run in (first, second)
    ]
    assert history[0].equals(history[1])
    assert first.table("results/test_predictions.csv").logit.equals(
        second.table("results/test_predictions.csv").logit
    )


def test_the_files_pasted_one_after_the_other_give_the_same_results(finished_run, shared, tmp_path):
    parameters = {
        name: str(value) if isinstance(value, Path) else value for name, value in shared.items()
    }
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    pasted(
        [edited(text, parameters) if "\nEPOCHS: int" in text else text for text in texts], tmp_path
    )
    same_results(finished_run, Run(tmp_path, ""))


@pytest.mark.slow
def test_fourteen_scripts_in_fourteen_processes_give_the_same_results(finished_run, tmp_path):
    for file in FILES:
        printed = run_script(file.stem, tmp_path, **CI_WITHOUT_ROBUSTNESS)
    same_results(finished_run, Run(tmp_path, ""))
    assert not re.search("^epoch ", printed, flags=re.M), "a finished training was repeated"


@pytest.mark.parametrize(
    ("first", "early", "missing"),
    [
        ([], 1, "cell_01"),
        pytest.param([0], 4, "cell_02", marks=pytest.mark.slow),
        ([0, 1, 2], 6, "cell_04"),
    ],
)
def test_a_cell_run_too_early_names_the_cell_to_run_first(tmp_path, first, early, missing):
    printed = pasted(
        [FILES[index].read_text(encoding="utf-8") for index in [*first, early]], tmp_path, expect=1
    )
    assert re.search(rf"(?:run |No module named ')({missing}\w+)", printed)


def test_a_name_that_papermill_was_given_and_that_is_no_parameter_stops_the_notebook(tmp_path):
    first, second = (FILES[index].read_text(encoding="utf-8") for index in (0, 1))
    parameters, rest = second.split("\n# %%\n", 1)
    printed = pasted([first, parameters, "# Parameters\nEPOCH = 3\n", rest], tmp_path, expect=1)
    assert "EPOCH is not a parameter; did you mean EPOCHS?" in printed


# Interruption, holding out, and the finished model


@pytest.mark.slow
def test_an_interrupted_training_resumes_to_the_same_end(finished_run, shared, tmp_path):
    stopped = run_script("cell_12_training_loop", tmp_path, **shared, TIME_BUDGET_HOURS=1e-6)
    assert "Stopped after 1 of 2 epochs" in stopped
    assert "Resuming after epoch 1" in run_script("cell_14_results_summary", tmp_path, **shared)
    same_results(finished_run, Run(tmp_path, ""))


def test_other_settings_do_not_resume_an_old_run(finished_run, shared, tmp_path):
    (tmp_path / "models").mkdir()
    checkpoint = finished_run.folder / "models" / "last_checkpoint.pth"
    (tmp_path / "models" / "last_checkpoint.pth").write_bytes(checkpoint.read_bytes())
    other = {**shared, "LEARNING_RATE": "0.01"}
    refused = run_script("cell_11_model_setup", tmp_path, expect=1, **other)
    assert "LEARNING_RATE: 0.0003 then, 0.01 now" in refused
    assert "Resuming" not in run_script("cell_11_model_setup", tmp_path, **other, RESUME="false")


def test_a_trained_model_scores_new_videos_without_training(finished_run, shared, tmp_path):
    """CHECKPOINT, EPOCHS=0 and PREDICT_DIR, with a held-out method and another IMAGE_SIZE."""
    trained = finished_run.folder / "models" / "best_model.pth"
    videos = shared["DATA_DIR"] / "fake"
    scoring = {
        **shared,
        "CHECKPOINT": trained,
        "EPOCHS": 0,
        "PREDICT_DIR": videos,
        "CACHE_DIR": "cache",
    }
    printed = run_script(
        "cell_14_results_summary",
        tmp_path,
        **{**scoring, "IMAGE_SIZE": 160, "HOLDOUT_METHODS": "[jitter]"},
    )
    run = Run(tmp_path, printed)
    assert "IMAGE_SIZE = 64" in run.output and not (run.folder / "models").exists()
    scored = run.table("results/predictions.csv").set_index("path")
    tested = finished_run.table("results/test_predictions.csv").query("label == 1")
    tested = tested.set_index("path")
    assert len(scored) == 12 and scored.error.isna().all()
    assert np.allclose(scored.probability[tested.index], tested.probability, atol=1e-4)
    by_method = run.table("results/metrics_by_method.csv").set_index("method")
    assert (
        not by_method.never_trained_on.any()
    )  # holding out now does not undo that it was trained on
    assert run.results["training"]["epochs"] == 0 and math.isfinite(
        run.results["model"]["threshold"]
    )


def test_a_trained_model_scores_videos_where_there_is_no_dataset(finished_run, tmp_path):
    """In a fresh folder, without the training data: nothing is made, evaluated or trained."""
    videos, work = tmp_path / "mine", tmp_path / "work"
    (videos / "deep").mkdir(parents=True)
    tested = finished_run.table("results/test_predictions.csv")
    for number, path in enumerate(tested.path):
        (videos / "deep" / f"{number}.mp4").write_bytes(Path(path).read_bytes())
    (videos / "broken.mp4").write_text("no video")
    model = finished_run.folder / "models" / "best_model.pth"
    parameters = dict(CHECKPOINT=model, EPOCHS=0, PREDICT_DIR=videos, WORK_DIR=work)
    run = Run(work, run_script("cell_14_results_summary", tmp_path / "elsewhere", **parameters))
    scored = run.table("results/predictions.csv")
    assert scored.path[0].endswith("broken.mp4") and "not a video" in scored.error[0]
    assert np.allclose(scored.probability[1:], tested.probability, atol=1e-4)
    assert "1 not readable" in run.output.split("Your own videos")[1]
    assert run.results["metrics"] == {} and run.results["predictions"] == {"videos": 7, "errors": 1}
    assert not (work / "models").exists() and not list(work.glob("demo*"))
    assert not (work / "results" / "test_predictions.csv").exists()


def test_a_dataset_is_evaluated_whole_even_if_one_class_is_all_it_has(
    finished_run, shared, tmp_path
):
    fakes = tmp_path / "set" / "fake"
    fakes.mkdir(parents=True)
    for path in sorted((finished_run.folder / "demo_videos_42" / "fake").glob("*.mp4"))[:5]:
        (fakes / path.name.replace("__", "__new-")).write_bytes(path.read_bytes())
    model = finished_run.folder / "models" / "best_model.pth"
    parameters = dict(
        CHECKPOINT=model, EPOCHS=0, DATA_DIR=fakes.parent, TEST_FRACTION=1, ROBUSTNESS=0
    )
    run = Run(
        tmp_path / "work", run_script("cell_14_results_summary", tmp_path / "work", **parameters)
    )
    assert run.results["data"]["videos"]["test"] == {"real": 0, "fake": 5}
    fitted = run.results["metrics"]["at_fitted_threshold"]
    assert (
        fitted["auc_roc"] is None and fitted["specificity"] is None and 0 <= fitted["recall"] <= 1
    )
    assert "metrics that need real videos are undefined: the test set has none" in run.output
    assert run.table("results/metrics_by_method.csv").never_trained_on.all(), (
        "the model never saw these methods"
    )


def test_no_dataset_is_for_scoring_alone(tmp_path):
    printed = run_script("cell_02_global_config", tmp_path, expect=1, DATA_DIR="none")
    assert "DATA_DIR = 'none' is for scoring PREDICT_DIR" in printed


# Training on real videos alone


def test_real_videos_alone_train_a_detector_that_is_tested_on_every_manipulation(shared, tmp_path):
    held_out = {"HOLDOUT_METHODS": "[blend, lowres, jitter]", "SELF_BLEND": 1, "CLIPS_PER_VIDEO": 2}
    light = {"BACKBONE": "shufflenet_v2_x0_5", "AUGMENTATION": "none"}
    parameters = {**shared, **held_out, **light}
    run = Run(tmp_path, run_script("cell_14_results_summary", tmp_path, **parameters))
    videos = run.results["data"]["videos"]
    assert videos["train"]["fake"] == videos["val"]["fake"] == 0 < videos["test"]["fake"]
    assert "Validation has no fakes: self-blends" in run.output
    assert run.table("results/metrics_by_method.csv").never_trained_on.all()
    assert run.table("results/training_history.csv").val_auc.notna().all()
    report = (tmp_path / "results" / "experiment_report.txt").read_text(encoding="utf-8")
    assert "threshold were chosen on self-blends" in report
    saved = torch.load(tmp_path / "models" / "best_model.pth", weights_only=True)["config"]
    assert saved["CLIPS_PER_VIDEO"] == 2


def test_without_fakes_to_train_on_a_smaller_share_of_self_blends_is_a_clear_error(
    shared, tmp_path
):
    held_out = {**shared, "HOLDOUT_METHODS": "[blend, lowres, jitter]"}
    printed = run_script("cell_09_data_preparation", tmp_path, expect=1, **held_out)
    assert "a split lacks a class" in printed and "SELF_BLEND = 1" in printed
