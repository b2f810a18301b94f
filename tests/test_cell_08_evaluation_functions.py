import math
from types import SimpleNamespace

import conftest
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
from torch.utils.data import DataLoader

import cell_05_model_definition
import cell_08_evaluation_functions as cell
from cell_01_imports_and_setup import show_figure
from cell_03_data_processing import ClipSettings, VideoError
from cell_04_dataset_class import ClipDataset
from cell_05_model_definition import DeepfakeDetector, DetectorOutput
from cell_06_loss_and_utils import FocalLoss
from cell_07_training_functions import validate

SMALL = ClipSettings(**conftest.SMALL)
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 200)
PROBS = np.clip(0.3 * LABELS + RNG.uniform(0, 0.7, 200), 0, 1)


def test_metrics_by_hand():
    labels, probs = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.9, 0.8, 0.4])
    metrics = cell.compute_metrics(labels, probs, 0.5)
    assert (
        metrics["accuracy"] == pytest.approx(3 / 5)
        and metrics["precision"] == metrics["recall"] == 0.5
    )
    assert metrics["specificity"] == pytest.approx(2 / 3) and metrics["f1"] == 0.5
    assert metrics["balanced_accuracy"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert metrics["auc_roc"] == pytest.approx(4 / 6)
    assert metrics["brier"] == pytest.approx((0.01 + 0.04 + 0.81 + 0.04 + 0.36) / 5)


@pytest.mark.parametrize(
    ("probs", "eer"),
    [
        ([0.1, 0.2, 0.8, 0.9], 0.0),
        ([0.9, 0.8, 0.2, 0.1], 1.0),
        ([0.1, 0.6, 0.5, 0.9], 0.5),
        ([0.5] * 4, 0.5),
    ],
)
def test_equal_error_rate_by_hand(probs, eer):
    assert cell.compute_metrics(np.array([0, 0, 1, 1]), np.array(probs), 0.5)[
        "eer"
    ] == pytest.approx(eer)


@pytest.mark.parametrize(
    ("label", "undefined"), [(0, {"recall", "f1"} - {"f1"}), (1, {"specificity"})]
)
def test_what_one_class_cannot_define_is_none(label, undefined):
    metrics = cell.compute_metrics(np.full(4, label), np.array([0.1, 0.2, 0.6, 0.7]), 0.5)
    always = {"auc_roc", "auc_pr", "eer", "balanced_accuracy"}
    assert {name for name, value in metrics.items() if value is None} >= always | undefined
    assert metrics["accuracy"] == 0.5


@pytest.mark.parametrize(("true", "offset"), [(0.5, 0.0), (1.0, -2.0), (3.0, 1.5)])
def test_the_miscalibration_of_scores_is_found(true, offset):
    logits = RNG.normal(0, 2, 20000)
    labels = (RNG.uniform(size=20000) < cell.probabilities(logits, 1.0)).astype(int)
    temperature, found = cell.fit_calibration(logits * true + offset, labels)
    assert temperature == pytest.approx(true, rel=0.1) and found == pytest.approx(
        offset, abs=0.1 * true
    )


def test_calibration_does_not_depend_on_how_frequent_fakes_are():
    labels = np.repeat([0, 1], [500, 4500])
    logits = RNG.normal(2 * labels, 1)
    temperature, offset = cell.fit_calibration(logits, labels)
    assert offset == pytest.approx(1, abs=0.15) and temperature == pytest.approx(0.5, rel=0.15)


def test_a_few_videos_told_apart_perfectly_do_not_make_it_certain_and_chance_makes_it_undecided():
    logits, labels = np.array([-0.2, -0.1, 0.1, 0.3]), np.array([0, 0, 1, 1])
    temperature, offset = cell.fit_calibration(logits, labels)
    probs = cell.probabilities(logits - offset, temperature)
    assert 0.1 < probs.min() < 0.4 and 0.6 < probs.max() < 0.95
    temperature, offset = cell.fit_calibration(np.tile(logits, 50), RNG.integers(0, 2, 200))
    assert np.abs(cell.probabilities(logits - offset, temperature) - 0.5).max() < 0.15


def test_every_metric_agrees_with_scikit_learn_also_with_ties_and_resampled_videos():
    probs, rng = PROBS.round(1).clip(0.05, 0.95), np.random.default_rng(1)
    for _ in range(5):
        rows = np.concatenate([np.arange(4) + 4 * group for group in rng.integers(50, size=50)])
        labels, scores, called = LABELS[rows], probs[rows], probs[rows] >= 0.4
        expected = {
            "auc_roc": skm.roc_auc_score(labels, scores),
            "auc_pr": skm.average_precision_score(labels, scores),
            "eer": eer_by_bisection(labels, scores),
            "log_loss": skm.log_loss(labels, scores),
            "brier": skm.brier_score_loss(labels, scores),
            "recall": skm.recall_score(labels, called),
            "specificity": skm.recall_score(1 - labels, ~called),
            "precision": skm.precision_score(labels, called),
            "f1": skm.f1_score(labels, called),
            "accuracy": skm.accuracy_score(labels, called),
            "balanced_accuracy": skm.balanced_accuracy_score(labels, called),
        }
        for limit in (1, 5):
            fpr, tpr, _ = skm.roc_curve(labels, scores, drop_intermediate=False)
            expected[f"tpr_at_{limit}_fpr"] = tpr[fpr <= limit / 100].max()
        found = cell.compute_metrics(labels, scores, 0.4)
        assert found == pytest.approx(found | expected)


def eer_by_bisection(labels, scores):
    """By bisection on the ROC curve."""
    fpr, tpr, _ = skm.roc_curve(labels, scores, drop_intermediate=False)
    low, high = 0.0, float(len(fpr) - 1)
    for _ in range(60):
        middle = (low + high) / 2
        at = [np.interp(middle, range(len(fpr)), values) for values in (fpr, tpr)]
        low, high = (low, middle) if at[0] + at[1] >= 1 else (middle, high)
    return np.interp(high, range(len(fpr)), fpr)


def test_hits_at_few_false_alarms_and_calibration_error_by_hand():
    labels, probs = (
        np.repeat([0, 1], [100, 4]),
        np.append(np.linspace(0, 0.5, 100), [0.49, 0.4975, 0.6, 0.9]),
    )
    metrics = cell.compute_metrics(labels, probs, 0.5)
    assert metrics["tpr_at_1_fpr"] == 0.75 and metrics["tpr_at_5_fpr"] == 1
    two_bins = cell.compute_metrics(np.array([0, 1, 1, 1]), np.array([0.2, 0.2, 0.9, 0.9]), 0.5)
    assert two_bins["ece"] == pytest.approx(0.5 * 0.3 + 0.5 * 0.1)


def test_an_interval_is_wider_where_videos_of_a_group_agree():
    """Every video twice: as independent samples they would seem to be twice as many."""
    labels, probs = LABELS[:60].repeat(2), PROBS[:60].repeat(2)
    by_group = cell.bootstrap(labels, probs, 0.5, np.arange(60).repeat(2))
    by_video = cell.bootstrap(labels, probs, 0.5, np.arange(120))
    single = cell.bootstrap(LABELS[:60], PROBS[:60], 0.5, np.arange(60))
    for metric in ("auc_roc", "balanced_accuracy", "brier"):
        widths = [
            high - low for low, high in (found[metric] for found in (by_group, by_video, single))
        ]
        assert widths[1] < 0.85 * widths[0] and widths[0] == pytest.approx(widths[2], rel=0.1), (
            metric
        )


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth_about_95_times_in_100():
    """Two videos of a class per group, whose scores share most variance; the true AUC is known."""
    rng, covered = np.random.default_rng(5), {True: 0, False: 0}
    truth = 0.5 * (1 + math.erf(1.5 / math.sqrt(2) / math.sqrt(2)))
    groups, labels = np.arange(240) // 4, np.tile([0, 0, 1, 1], 60)
    for _ in range(200):
        shared = (
            rng.normal(size=(120, 1)).repeat(2, axis=1).ravel()
        )  # of two reals, or of two fakes, of a group
        scores = np.sqrt(0.8) * shared + np.sqrt(0.2) * rng.normal(size=240) + 1.5 * labels
        for by_group in covered:
            units = groups if by_group else np.arange(240)
            probs = cell.probabilities(scores, 1.0)
            low, high = cell.bootstrap(labels, probs, 0.5, units, ["auc_roc"])["auc_roc"]
            covered[by_group] += low <= truth <= high
    assert 180 <= covered[True] <= 198, "about 95 %"
    assert covered[False] < covered[True], "videos of one group taken for independent: too sure"


def test_the_offset_fits_classes_of_different_spread():
    """No other offset gives a lower log loss: the middle of the class means does not."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(-2, 3, 400), rng.normal(2, 0.5, 400)])
    labels = np.repeat([0, 1], 400)
    temperature, offset = cell.fit_calibration(logits, labels)

    def loss(shift: float) -> float:
        return cell.METRIC_FUNCTIONS["log_loss"](
            labels == 1, cell.probabilities(logits - offset - shift, temperature)
        )

    assert abs(offset) > 0.2 and loss(0) < min(loss(-0.2), loss(0.2))


def test_the_threshold_separates_best_and_is_near_one_half_among_equals():
    assert cell.fit_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])) == 0.5
    assert cell.fit_threshold(
        np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])
    ) == pytest.approx(0.25)
    assert cell.fit_threshold(np.array([0.6, 0.7, 0.9]), np.array([0, 0, 1])) == pytest.approx(0.8)


def test_the_threshold_is_the_best_of_all_there_are():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = np.append([0, 1], rng.integers(0, 2, 40))
        probs = (0.3 * labels + 0.7 * rng.random(42)).round(seed % 2 + 1)
        quality = [skm.balanced_accuracy_score(labels, probs >= t) for t in np.append(probs, 0.5)]
        chosen = skm.balanced_accuracy_score(labels, probs >= cell.fit_threshold(probs, labels))
        assert chosen == pytest.approx(max(quality))


def test_a_readme_beside_a_model_is_its_card_only_if_it_says_so(tmp_path):
    saved = {"config": {"BACKBONE": "resnet18"}, "trained_on": ["swap"], "val_auc": 0.9}
    (tmp_path / "README.md").write_text("# My project\n\nSome words.\n")
    assert "Trained on swap" in cell.describe_model(tmp_path / "model.pth", saved)
    (tmp_path / "README.md").write_text("# Model card: model.pth\n\nIt is **weak**.\n")
    assert cell.describe_model(tmp_path / "model.pth", saved).endswith("It is weak.")
    (tmp_path / "README.md").write_bytes(b"# Model card: model.pth" + b"\n\xe9")
    oldest = {"config": {"BACKBONE": "resnet18"}, "val_auc": 0.9}
    assert "Trained on unknown" in cell.describe_model(tmp_path / "model.pth", oldest)


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
            "group": ["a", "b", "c", "a", "b", "c", "d"],
            "dataset": ["A", "A", "B", "A", "A", "B", "B"],
        }
    )


def test_each_method_is_measured_against_all_reals(table):
    by_method = cell.metrics_by("method", table, 0.5, {"y"}).set_index("method")
    assert by_method.auc_roc.to_dict() == {"x": 1.0, "y": pytest.approx(4 / 6)}
    assert by_method.never_trained_on.to_dict() == {"x": False, "y": True}
    assert by_method.reals.tolist() == [3, 3] and (by_method.auc_low <= by_method.auc_roc).all()


def test_a_single_fake_has_an_auc_but_no_interval(table):
    alone = table.drop(index=[3])
    by_method = cell.metrics_by("method", alone, 0.5).set_index("method")
    assert by_method.auc_roc["x"] == 1 and np.isnan(by_method.auc_low["x"])
    assert by_method.auc_low.notna().to_dict() == {"x": False, "y": True}
    assert cell.format_metric(1.0, tuple(by_method.loc["x", ["auc_low", "auc_high"]])) == "1.000"


def test_a_metric_reads_as_value_and_interval_or_undefined():
    assert cell.format_metric(0.9444, (0.902, 0.9751)) == "0.944 [0.902, 0.975]"
    assert cell.format_metric(None) == cell.format_metric(float("nan")) == "undefined"
    assert cell.format_metric(0.5, (None, None)) == "0.500"


def test_undefined_metrics_and_single_classes_cause_no_warnings(recwarn):
    for label in (0, 1):
        cell.bootstrap(np.full(4, label), np.array([0.1, 0.2, 0.6, 0.7]), 0.9, np.arange(4))
        cell.fit_calibration(np.array([0.3, 0.4]), np.full(2, label))
    cell.fit_calibration(np.zeros(6), np.array([0, 0, 0, 1, 1, 1]))
    cell.fit_calibration(1e4 * RNG.normal(LABELS), LABELS)
    assert not list(recwarn)


def test_each_dataset_is_measured_by_itself(table):
    by_dataset = cell.metrics_by("dataset", table, 0.5).set_index("dataset")
    assert by_dataset.auc_roc.to_dict() == {"A": 1.0, "B": 0.5}
    assert by_dataset.reals.to_dict() == {"A": 2, "B": 1}


def plot_scores_of(table):
    return cell.plot_scores(table, cell.metrics_by("method", table, 0.5), 0.5)


def test_manipulations_with_too_few_fakes_come_last_with_hollow_marks(table):
    many = pd.concat([table.assign(method=name) for name in ("a", "b") for _ in range(2)])
    many = pd.concat([many, table[table.method == "y"]])  # "y" has 2 fakes, the others 8
    many.loc[many.label == 0, "method"] = "real"
    many.loc[many.method == "a", "probability"] += 0.1
    figure = plot_scores_of(many)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["real (12)", "b (8)", "a (8)", "y (2)"]
    marks = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [False, False, True]
    plt.close(figure)


def test_every_figure_is_drawn_and_written(table, clip_table, tmp_path):
    plt.close("all")  # of other tests
    labels, probs = table.label.to_numpy(), table.probability.to_numpy()
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
        "confusion": cell.plot_confusion(labels, probs, 0.5),
        "curves": cell.plot_curves(table, 0.5, (0.7, 0.95)),
        "scores": plot_scores_of(table),
        "calibration": cell.plot_calibration(labels, probs),
        "mistakes": cell.plot_mistakes(table.assign(correct=True), 0.5),
        "one class": cell.plot_curves(table[table.label == 1], 0.5, (None, None)),
        "only fakes": plot_scores_of(table[table.label == 1]),
        "only reals": plot_scores_of(table[table.label == 0]),
    }
    titles = {
        name: figure.get_suptitle() or figure.axes[0].get_title(loc="left")
        for name, figure in figures.items()
    }
    assert titles["history"] == "Best validation AUC 0.500, in epoch 1 of 2"
    assert titles["confusion"] == "5 of 7 videos called right"
    assert titles["scores"] == "2 of 7 videos on the wrong side"
    assert titles["curves"] == "AUC 0.833 [0.700, 0.950]"
    assert titles["calibration"] == "P(fake) is off by 31 points on average (ECE)"
    assert (
        titles["mistakes"] == "No mistakes in 7 videos" and "only one class" in titles["one class"]
    )
    for name, figure in figures.items():
        show_figure(figure, tmp_path / "deep" / f"{name}.png")
        assert plt.imread(tmp_path / "deep" / f"{name}.png").std() > 0.01
    assert not plt.get_fignums()


class Brightness(torch.nn.Module):
    """Calls bright clips fake."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, clips):
        frame_logits = self.weight * clips.mean(dim=(2, 3, 4))
        return DetectorOutput(frame_logits.mean(dim=1), frame_logits, frame_logits)


@pytest.fixture(scope="module")
def network():
    """A small detector, and clips to show it."""
    torch.manual_seed(0)
    small = SimpleNamespace(
        **{
            "BACKBONE": "mobilenet_v3_small",
            "IMAGE_SIZE": 64,
            "GRADIENT_CHECKPOINTING": False,
            "LSTM_HIDDEN": 8,
            "DROPOUT": 0.5,
            "REFERENCE": 0.0,
        },
        **{"LSTM_LAYERS": 1, "ATTENTION_HEADS": 2, "FRAMES_PER_VIDEO": 4, "MIRROR_TEST": False},
    )
    return cell_05_model_definition.build_model(small).eval()


class OneField(torch.nn.Module):
    """A backbone whose only feature is the mean of one channel, in fields of 8 pixels."""

    def __init__(self):
        super().__init__()
        self.field = torch.nn.Conv2d(3, 1, 8, stride=8, bias=False)
        self.field.weight.data.zero_()[:, 0] = 1 / 64

    def forward(self, images):
        return self.field(images).mean(dim=(2, 3))


@pytest.mark.parametrize("reference", [0.0, 5.0])
def test_heat_is_where_the_evidence_is(reference):
    model = cell_05_model_definition.DeepfakeDetector(
        OneField(), 1, 4, attention_heads=2, frames=4
    ).eval()
    model.reference = reference
    for weight in model.head.parameters():
        weight.data.zero_()
    model.frame_head[1].weight.data.fill_(1.0)
    clips = torch.zeros(2, 4, 3, 64, 64)
    clips[0, 2, 0, 16:32, 40:56] = 1  # what the network looks for, in one frame
    clips[1, :, 1, :16, :16] = 1  # something else
    heat, output = cell.heat_maps(model, clips)
    assert heat.shape == (2, 4, 64, 64) and output.frame_logits.shape == (2, 4)
    assert (
        heat[0, 2, 20:28, 44:52].min()
        > 0
        == heat[0, 2, 40:].max()
        == heat[0, [0, 1, 3]].max()
        == heat[1].max()
    )


def test_a_network_without_feature_maps_has_no_heat_and_still_scores():
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 4))
    model = DeepfakeDetector(backbone, 4, 4, 0, 2, frames=2).eval()
    heat, output = cell.explain(model, np.zeros((2, 8, 8, 3), np.uint8))
    assert heat.shape == (2, 8, 8) and not heat.any() and output.logit.isfinite().all()


def test_the_heat_of_a_clip_does_not_change_the_network(network):
    clips = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        before = network(clips).logit
    output = cell.heat_maps(network, clips)[1]
    assert torch.allclose(output.logit, before) and all(
        weight.grad is None for weight in network.parameters()
    )
    assert not any(module._forward_hooks for module in network.modules())


def test_explanations_and_mistakes_show_what_was_right_and_wrong(network, clip_table):
    table = clip_table.assign(probability=np.random.default_rng(2).uniform(size=len(clip_table)))
    table["correct"] = (table.probability >= 0.5) == (table.label == 1)
    examples = cell.pick_examples(table, 0.5)
    assert set(zip(examples.correct, examples.label, strict=True)) <= {
        (c, x) for c in (True, False) for x in (0, 1)
    }
    assert len(examples) == len(table.groupby(["correct", "label"]))
    figure = cell.plot_explanations(examples, network, 1.0)
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert len(titles) == len(examples) and "right" in titles[0] and "P(fake)" in titles[0]
    lines = [ax for part in figure.subfigs for ax in part.axes if ax.lines]
    assert len(lines) == len(examples) and len(lines[0].lines[0].get_ydata()) == 4
    mistakes = cell.plot_mistakes(table, 0.5)
    wrong = int((~table.correct).sum())
    assert mistakes.get_suptitle().startswith(f"{wrong} of {len(table)} videos called wrong")
    assert sum(bool(ax.images) for ax in mistakes.axes) == min(wrong, 9)
    plt.close("all")


def test_robustness_has_a_row_a_degradation_of_the_same_videos(network, clip_table):
    clip_table = clip_table.groupby("label").head(5).reset_index(drop=True)
    loader = DataLoader(ClipDataset(clip_table, 2), 8)
    logits = validate(network, loader, FocalLoss(0.0), torch.device("cpu")).logits
    table = clip_table.assign(logit=logits)
    found = cell.measure_robustness(network, table, loader, 10**6)
    assert len(found) == 1 + len(cell.CHANGES) and (found.videos == len(table)).all()
    assert found.auc_roc[0] == pytest.approx(skm.roc_auc_score(table.label, logits))
    assert (found.auc_low <= found.auc_roc).all() and found.auc_roc.nunique() > 5
    few = cell.measure_robustness(network, table, loader, 4)
    assert (few.videos == 4).all() and cell.plot_robustness(few).get_suptitle().startswith("AUC ")
    plt.close("all")


@pytest.mark.parametrize("name", cell.DEGRADATIONS)
def test_a_stronger_degradation_changes_a_picture_more(name, clip_table):
    change, strengths = cell.DEGRADATIONS[name]
    with np.load(clip_table.clip_file[0]) as saved:
        clip = saved["frames"]
    changed = [
        cell.change_frames(change, strength, clip) for strength in strengths.values() if strength
    ]
    assert all(other.shape == clip.shape and other.dtype == np.uint8 for other in changed)
    distances = [np.abs(other.astype(int) - clip).mean() for other in changed]
    assert min(distances) > 0.3 and (name == "brightness" or distances == sorted(distances))


def test_one_video_is_scored_with_its_frames(demo_set, face_detector):
    path = next((demo_set / "real").glob("*.mp4"))
    found = cell.Predictor(Brightness(), SMALL, face_detector, 2.0, 0.0).predict_video(path)
    assert found.verdict == "fake" and found.frame_scores.shape == (4,) and found.face_share == 1
    logit = np.log(found.probability / (1 - found.probability))
    doubled = cell.Predictor(Brightness(), SMALL, face_detector).predict_video(path).probability
    assert np.log(doubled / (1 - doubled)) == pytest.approx(2 * logit, rel=1e-4)


def test_an_unusable_video_says_which_and_why(tmp_path):
    predictor = cell.Predictor(Brightness(), SMALL, None)
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"x\.mp4: .*not a video"):
        predictor.predict_video(tmp_path / "x.mp4")
