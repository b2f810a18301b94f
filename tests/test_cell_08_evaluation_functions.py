import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
from conftest import SMALL

import cell_08_evaluation_functions as cell
from cell_03_data_processing import VideoError
from cell_05_model_definition import Output

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 200)
CHANCES = np.clip(0.3 * LABELS + RNG.uniform(0, 0.7, 200), 0, 1)


def test_metrics_by_hand():
    labels, chances = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.9, 0.8, 0.4])
    metrics = cell.compute_metrics(labels, chances, 0.5)
    assert metrics["accuracy"] == pytest.approx(3 / 5) and metrics["precision"] == metrics["recall"] == 0.5
    assert metrics["specificity"] == pytest.approx(2 / 3) and metrics["f1"] == 0.5
    assert metrics["balanced_accuracy"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert metrics["auc_roc"] == pytest.approx(4 / 6)
    assert metrics["brier"] == pytest.approx((0.01 + 0.04 + 0.81 + 0.04 + 0.36) / 5)


def test_metrics_agree_with_scikit_learn():
    metrics, called = cell.compute_metrics(LABELS, CHANCES, 0.4), CHANCES >= 0.4
    assert metrics["f1"] == pytest.approx(skm.f1_score(LABELS, called))
    assert metrics["balanced_accuracy"] == pytest.approx(skm.balanced_accuracy_score(LABELS, called))
    assert metrics["auc_pr"] == pytest.approx(skm.average_precision_score(LABELS, CHANCES))
    assert metrics["log_loss"] == pytest.approx(skm.log_loss(LABELS, CHANCES))
    assert metrics["brier"] == pytest.approx(skm.brier_score_loss(LABELS, CHANCES))


@pytest.mark.parametrize(
    ("chances", "eer"),
    [([0.1, 0.2, 0.8, 0.9], 0.0), ([0.9, 0.8, 0.2, 0.1], 1.0), ([0.1, 0.6, 0.5, 0.9], 0.5), ([0.5] * 4, 0.5)],
)
def test_equal_error_rate_by_hand(chances, eer):
    assert cell.equal_error_rate(np.array([0, 0, 1, 1]), np.array(chances)) == pytest.approx(eer)


@pytest.mark.parametrize(("label", "undefined"), [(0, {"recall", "f1"} - {"f1"}), (1, {"specificity"})])
def test_what_one_class_cannot_define_is_none(label, undefined):
    metrics = cell.compute_metrics(np.full(4, label), np.array([0.1, 0.2, 0.6, 0.7]), 0.5)
    always = {"auc_roc", "auc_pr", "eer", "balanced_accuracy"}
    assert {name for name, value in metrics.items() if value is None} >= always | undefined
    assert metrics["accuracy"] == 0.5


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_generated_the_scores_is_found(true):
    logits = RNG.normal(0, 2, 20000)
    labels = (RNG.uniform(size=20000) < cell.probabilities(logits, 1.0)).astype(int)
    assert cell.fit_temperature(logits * true, labels) == pytest.approx(true, rel=0.1)


def test_the_threshold_separates_best_and_is_near_one_half_among_equals():
    assert cell.fit_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])) == 0.5
    assert cell.fit_threshold(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    assert cell.fit_threshold(np.array([0.6, 0.7, 0.9]), np.array([0, 0, 1])) == pytest.approx(0.8)


def test_probabilities_never_overflow():
    assert cell.probabilities(np.array([-1e9, 0, 1e9]), 0.5).tolist() == pytest.approx([0, 0.5, 1])


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "label": [0, 0, 0, 1, 1, 1, 1],
            "method": ["real"] * 3 + ["x", "x", "y", "y"],
            "probability": [0.1, 0.2, 0.6, 0.9, 0.8, 0.15, 0.7],
            "path": [f"/videos/{i}.mp4" for i in range(7)],
        }
    )


def test_each_method_is_measured_against_all_reals(table):
    by_method = cell.metrics_by_method(table, 0.5, {"y"}).set_index("method")
    assert by_method.auc_roc.to_dict() == {"x": 1.0, "y": pytest.approx(4 / 6)}
    assert by_method.never_trained_on.to_dict() == {"x": False, "y": True}


def test_every_figure_is_drawn_and_written(table, clip_table, tmp_path):
    labels, chances = table.label.to_numpy(), table.probability.to_numpy()
    history = pd.DataFrame(
        {
            **{f"{s}_{q}": [0.5, 0.7] for s in ("train", "val") for q in ("loss", "auc")},
            "epoch": [1, 2],
            "best": [True, False],
        }
    )
    figures = {
        "samples": cell.plot_samples(clip_table),
        "history": cell.plot_history(history),
        "confusion": cell.plot_confusion(labels, chances, 0.5),
        "curves": cell.plot_curves(labels, chances, 0.5),
        "scores": cell.plot_scores(table, 0.5),
    }
    titles = {name: figure.get_suptitle() or figure.axes[0].get_title(loc="left") for name, figure in figures.items()}
    assert titles["history"] == "Best validation AUC 0.500, in epoch 1 of 2"
    assert titles["confusion"] == "5 of 7 videos called right"
    assert titles["scores"] == "2 of 7 videos on the wrong side"
    assert titles["curves"].startswith("AUC 0.833")
    for name, figure in figures.items():
        cell.save_figure(figure, tmp_path / "deep" / f"{name}.png")
        assert plt.imread(tmp_path / "deep" / f"{name}.png").std() > 0.01
    assert not plt.get_fignums()


class Brightness(torch.nn.Module):
    """Calls bright clips fake."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, clips):
        frame_logits = self.weight * clips.mean(dim=(2, 3, 4))
        return Output(frame_logits.mean(dim=1), frame_logits, frame_logits)


def test_one_video_is_scored_with_its_frames(demo_set, face_detector):
    path = next((demo_set / "real").glob("*.mp4"))
    found = cell.predict_video(path, Brightness(), SMALL, face_detector, temperature=2.0, threshold=0.0)
    assert found.verdict == "fake" and found.frame_scores.shape == (4,) and found.face_share == 1
    logit = np.log(found.probability / (1 - found.probability))
    doubled = cell.predict_video(path, Brightness(), SMALL, face_detector, temperature=1.0).probability
    assert np.log(doubled / (1 - doubled)) == pytest.approx(2 * logit, rel=1e-4)


def test_a_folder_is_scored_in_order_and_bad_files_say_why(demo_set, face_detector, tmp_path):
    videos = sorted((demo_set / "real").glob("*.mp4"))[:5]
    (tmp_path / "deep").mkdir()
    for number, video in enumerate(videos):
        (tmp_path / "deep" / f"{number}.mp4").write_bytes(video.read_bytes())
    (tmp_path / "deep" / "2b.mp4").write_text("no video")
    scored = cell.predict_folder(tmp_path, Brightness(), SMALL, face_detector, threshold=0.4)
    assert [path.rsplit("/")[-1] for path in scored.path] == ["0.mp4", "1.mp4", "2.mp4", "2b.mp4", "3.mp4", "4.mp4"]
    assert "not a video" in scored.error[3] and pd.isna(scored.probability[3])
    expected = [cell.predict_video(v, Brightness(), SMALL, face_detector).probability for v in videos]
    assert scored.probability.dropna().tolist() == pytest.approx(expected, abs=1e-6)
    assert list(scored) == ["path", "probability", "verdict", "threshold", "face_share", "seconds", "error"]


def test_an_empty_folder_gives_an_empty_table_and_one_bad_file_its_error(tmp_path):
    assert cell.predict_folder(tmp_path, Brightness(), SMALL, None).empty
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(VideoError, match="not a video"):
        cell.predict_video(tmp_path / "x.mp4", Brightness(), SMALL, None)
