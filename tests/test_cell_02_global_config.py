import dataclasses
import math

import papermill
import pytest
import torch
from processes import ROOT

import cell_02_global_config as cell
from cell_02_global_config import CONFIG, Config


def changed(**parameters) -> Config:
    return dataclasses.replace(CONFIG, **parameters)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("EPOCHS", -1, "from 0 to"),
        ("EPOCHS", 2.5, "float, not int"),
        ("EPOCHS", True, "bool, not int"),
        ("DROPOUT", 1.5, "from 0 to 0.95"),
        ("DROPOUT", float("nan"), "out of range"),
        ("LEARNING_RATE", "fast", "str, not float"),
        ("FACE_CROP", 1, "int, not bool"),
        ("DATASET_SHARES", ["mine"], "'mine' is not a dataset's name and a number above 0"),
        ("DATASET_SHARES", ["mine -1"], "'mine -1' is not a dataset's name"),
        ("BACKBONE", "resnet5O", "not a torchvision classification model; try resnet50, "),
        ("AMP", "fp8", "one of auto"),
        ("METHODS", [1], "list, not list of str"),
        ("ATTENTION_HEADS", 7, "does not divide"),
        ("TEST_FRACTION", 0.85, "VAL_FRACTION"),
        ("WEIGHTS_PATH", "no/such/file.pth", "does not exist"),
        ("CHECKPOINT", "no/such/file.pth", "does not exist"),
        ("EPOCHS", 0, "CHECKPOINT"),
    ],
)
def test_a_value_that_cannot_work_is_one_error_that_names_the_parameter(name, value, says):
    with pytest.raises((TypeError, ValueError), match=says) as caught:
        changed(**{name: value})
    assert name in str(caught.value)


def test_the_time_is_limited_on_kaggle_or_where_asked_for(monkeypatch):
    assert changed().time_budget == math.inf and changed(TIME_BUDGET_HOURS=2).time_budget == 7200
    monkeypatch.setattr(cell, "ON_KAGGLE", True)
    assert changed().time_budget == 11 * 3600 and changed(TIME_BUDGET_HOURS=2).time_budget == 7200


def test_whole_numbers_and_yaml_texts_do_for_fractional_parameters():
    assert changed(LEARNING_RATE="1e-4").LEARNING_RATE == 1e-4
    assert type(changed(CLIP_SECONDS=5).CLIP_SECONDS) is float


def test_the_configuration_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.EPOCHS = 3


def test_the_environment_overrides_parameters_by_type():
    found = cell.parameters_from_environment(
        {
            "DEEPFAKE_EPOCHS": "3",
            "DEEPFAKE_FACE_CROP": "false",
            "DEEPFAKE_METHODS": "[FaceSwap]",
            "HOME": "/root",
        }
    )
    assert found == {"EPOCHS": 3, "FACE_CROP": False, "METHODS": ["FaceSwap"]}
    assert cell.parameters_from_environment({"DEEPFAKE_DATA_DIR": "2024"}) == {"DATA_DIR": "2024"}


def test_an_unknown_override_stops_the_run_and_suggests_the_nearest():
    with pytest.raises(
        ValueError, match="DEEPFAKE_EPOCH: EPOCH is not a parameter; did you mean EPOCHS"
    ):
        cell.parameters_from_environment({"DEEPFAKE_EPOCH": "3"})


def test_with_a_checkpoint_the_clip_and_model_settings_come_from_it(tmp_path):
    file = tmp_path / "best_model.pth"
    torch.save(
        {"config": dataclasses.asdict(changed(IMAGE_SIZE=96, LSTM_HIDDEN=64, EPOCHS=7))}, file
    )
    adopted = cell.adopt_checkpoint(changed(CHECKPOINT=str(file), EPOCHS=0))
    assert (adopted.IMAGE_SIZE, adopted.LSTM_HIDDEN, adopted.EPOCHS) == (96, 64, 0)


def test_model_files_of_older_versions_are_understood(tmp_path):
    gone = {"MIRROR_TEST": False, "TRAINABLE": "all", "COMPILE": False, "BACKBONE_LR": 1.0}
    saved = {**dataclasses.asdict(changed(IMAGE_SIZE=96)), **gone}
    del saved["CLIPS_PER_VIDEO"]  # which used to be one
    assert not gone.keys() & cell.saved_config({"config": saved}).keys()
    torch.save({"config": saved}, file := tmp_path / "best_model.pth")
    adopted = cell.adopt_checkpoint(changed(CHECKPOINT=str(file), EPOCHS=0))
    assert (adopted.IMAGE_SIZE, adopted.CLIPS_PER_VIDEO) == (96, 1)


def test_seeding_repeats_the_draws():
    cell.seed_everything(5)
    first = torch.rand(3)
    cell.seed_everything(5)
    assert torch.equal(first, torch.rand(3))


def test_papermill_lists_every_parameter_with_type_and_meaning():
    listed = papermill.inspect_notebook(str(ROOT / "notebooks" / "deepfake_detection.ipynb"))
    assert list(listed) == [field.name for field in dataclasses.fields(Config)]
    for name, entry in listed.items():
        assert entry["inferred_type_name"] == Config.__dataclass_fields__[name].type.__name__
        assert len(entry["help"]) > 10, name


def test_a_single_name_is_taken_for_a_list_of_one():
    assert changed(HOLDOUT_METHODS="FaceSwap").HOLDOUT_METHODS == ["FaceSwap"]


def test_a_name_that_papermill_was_given_and_that_is_no_parameter_stops_the_run():
    cell.check_injected(
        ["", "# Parameters\nEPOCHS = 3\nMETHODS = ['a']\n", "# Parameters of mine\nx = 1"]
    )
    cell.check_injected(["# Parameters\nEPOCHS, SEED = 3, 1\n"])  # the user's own cell
    with pytest.raises(ValueError, match=r"EPOCH is not a parameter; did you mean EPOCHS\?"):
        cell.check_injected(["# Parameters\nSEED = 3\nEPOCH = 3\n"])
    with pytest.raises(
        ValueError, match=r"learning_rate is not a parameter; did you mean LEARNING_RATE\?"
    ):
        cell.check_injected(["# Parameters\nlearning_rate = 0.1\n"])
    with pytest.raises(ValueError, match=r"XYZ is not a parameter\. Section 2 lists them"):
        cell.check_injected(["# Parameters\nXYZ = 1\n"])


def test_each_gpu_draws_numbers_of_its_own_that_depend_on_the_seed_alone(monkeypatch):
    """DataParallel's copies would otherwise drop the same units."""
    gpus = tuple(torch.Generator() for _ in range(2))
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    with torch.random.fork_rng():
        draws = []
        for seed in (1, 1, 2):
            cell.seed_everything(seed)
            draws.append([float(torch.rand((), generator=gpu)) for gpu in gpus])
    assert draws[0] == draws[1] and len({*draws[0], *draws[2]}) == 4


def test_float32_is_float32_on_every_gpu():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("choice", "clips", "synchronised"),
    [("auto", 7, True), ("auto", 8, False), ("on", 8, True), ("off", 2, False)],
)
def test_processes_with_enough_clips_keep_their_own_batch_statistics(choice, clips, synchronised):
    assert changed(SYNC_BATCH_NORM=choice).syncs_batch_norm(clips) == synchronised


def test_what_is_no_model_file_is_a_clear_error_and_a_missing_one_is_missing(tmp_path):
    (tmp_path / "text.pth").write_text("hello world")
    for path in (tmp_path, tmp_path / "text.pth"):
        with pytest.raises(ValueError, match="is not a model file"):
            cell.read_model_file(path)
    with pytest.raises(FileNotFoundError):
        cell.read_model_file(tmp_path / "none.pth")


def test_a_variable_that_is_no_yaml_is_named():
    with pytest.raises(ValueError, match="DEEPFAKE_METHODS: '.FaceSwap' is not a YAML value"):
        cell.parameters_from_environment({"DEEPFAKE_METHODS": "[FaceSwap"})
