"""Train on real footage, test on generators and sources that were left out.

    python tests/benchmarks/real_footage/leave_out.py CORPUS --stills STILLS --initial STAGE1.pth
        [--output runs/leave_out] [--jobs 2] [--final MODEL.pth] [-p NAME VALUE]

CORPUS is what assemble.py brought; STILLS holds datasets of face crops (see docs/training.md). The
generators are dealt into four folds, whole families at a time; reals follow the fakes of their
group, and others the footage they came with. For each fold the notebook is run with
notebooks/params/finetune.yaml on the other three and on the stills, starting from stage one, and
tested on the fold. All videos are thus scored by models that know neither their people nor their
generator. Finished runs are kept.

`--final` then trains on everything and writes the model, in half precision, calibrated on the
scores of the left-out videos.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from evaluate import (
    ROOT,
    degraded_logits,
    find_corpus,
    print_false_alarms,
    print_report,
    with_trivia,
    write_final,
)

from cell_05_model_definition import load_detector
from cell_08_evaluation_functions import calibrate

FOLDS = ("A", "B", "C", "D")
# Generators that are one another's parts or versions are left out together.
FAMILIES = {
    "Wav2Lip": "Wav2Lip",
    "EMO|VASA": "EMO and VASA",
    "Hallo": "Hallo",
    "EchoMimic": "EchoMimic",
    "LivePortrait": "LivePortrait",
    "Deepfakes|FaceSwap|Face2Face|NeuralTextures|FaceShifter|DFD|ffpp": "FaceForensics++",
}


def family_of(method: str) -> str:
    found = (name for pattern, name in FAMILIES.items() if re.search(pattern, method))
    return next(found, method)


def deal_families(fakes: pd.DataFrame) -> dict[str, str]:
    """The fold of each family of generators, so that the folds get about as many of each kind.

    One by one, large ones first: to the fold that has fewest of the kind it mostly makes.
    """
    kinds = pd.crosstab(fakes.family, fakes.kind)
    dealt = pd.DataFrame(0.0, index=FOLDS, columns=[*kinds, "all"])
    folds: dict[str, str] = {}
    large_first = kinds.sum(axis=1).sort_values(kind="stable").index[::-1]
    for family, counts in kinds.loc[large_first].iterrows():
        order = dealt.sort_values([counts.idxmax(), "all"], kind="stable")
        folds[str(family)] = fold = order.index[0]
        dealt.loc[fold] += [*counts, counts.sum()]
    return folds


def assign_folds(videos: pd.DataFrame) -> pd.Series:
    """The fold of each video: that of its generator's family or group, else of its repository.

    A group with fakes of several folds is tested in the first, and its other videos nowhere.
    """
    videos = videos.assign(family=videos.method.map(family_of))
    fakes = videos[videos.label == 1]
    fold = videos.family.map(deal_families(fakes)).where(videos.label == 1)
    source = videos.path.map(lambda path: re.sub(r"-[0-9a-f]{12}(-x\d+)?\.mp4$", "", path.name))
    for key in (videos.group, source):
        fold = fold.fillna(key.map(fold.groupby(key).first()))
    in_turn = {name: FOLDS[i % 4] for i, name in enumerate(sorted({*videos.group}))}
    return fold.fillna(videos.group.map(in_turn))


def with_folds(videos: pd.DataFrame) -> pd.DataFrame:
    """The videos with their `fold`, and with groups as the corpus names them."""
    group = videos.group.str.partition("/")[2]
    return videos.assign(fold=assign_folds(videos), group=group)


def may_be_known(videos: pd.DataFrame, tested: pd.Series) -> pd.Series:
    """Which videos a model may have seen: nobody is on both sides."""
    return ~tested & ~videos.group.isin(videos.group[tested])


def data_folder(folder: Path, videos: pd.DataFrame, fold: str, stills: Path) -> Path:
    """A DATA_DIR with the stills and the corpus, split so that `fold` is the test set.

    A tenth of the other groups chooses the epoch: stills alone would choose the first.
    """
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for dataset in stills.iterdir():
        if not (folder / dataset.name).exists():
            (folder / dataset.name).symlink_to(dataset.resolve())
    tested = videos.fold == fold
    known = may_be_known(videos, tested)
    validates = videos.group.isin(sorted({*videos.group[known]})[::10])
    split = np.select([tested, validates], ["test", "val"], "train")
    table = videos.assign(split=split)[tested | known]
    table = table.assign(label=table.label.map({0: "real", 1: "fake"}))
    columns = ["path", "label", "method", "group", "split"]
    table[columns].to_csv(folder / "corpus" / "manifest.csv", index=False)
    return folder


def run_notebook(data: Path, output: Path, cache: Path, parameters: list[str]) -> pd.DataFrame:
    """Train and test, once; returns the scores of the corpus's test videos."""
    file = output / "results" / "test_predictions.csv"
    if not file.exists():
        words = ["run", "finetune", "-p", "DATA_DIR", data, "-p", "CACHE_DIR", cache, *parameters]
        command = [sys.executable, ROOT / "build_notebook.py", *words, "--output", output]
        subprocess.run([str(word) for word in command], check=True, env=os.environ)
    table = pd.read_csv(file)
    files = pd.read_csv(output / "data" / "test.csv")[["path", "clip_file"]]
    return table[table.dataset == "corpus"].merge(files, on="path")


def folder_of(given: argparse.Namespace, fold: str) -> Path:
    return given.output / re.sub(r"\W+", "_", fold)


def train(given: argparse.Namespace, videos: pd.DataFrame, fold: str) -> pd.DataFrame:
    """The scores of a fold's videos by the model trained without them; "none" leaves out none."""
    place = folder_of(given, fold)
    data = data_folder(place / "data", videos, fold, given.stills)
    parameters = ["-p", "INITIAL_MODEL", str(given.initial.resolve())]
    for name, value in {"VAL_FRACTION": 0.02, "TEST_FRACTION": 0.01, **dict(given.p)}.items():
        parameters += ["-p", name, str(value)]
    return run_notebook(data, place / "run", given.corpus / "cache", parameters)


def left_out_scores(given: argparse.Namespace) -> pd.DataFrame:
    """Every video of the corpus with the logit of the model of its fold, and its trivia."""
    videos = with_folds(find_corpus(given.corpus))
    folds = [*FOLDS, *(["none"] if given.final else [])]
    with ThreadPoolExecutor(given.jobs) as pool:
        scored = list(pool.map(partial(train, given, videos), folds))
    tests = pd.concat(scored[: len(FOLDS)]).set_index("path")
    videos = videos.assign(name=videos.path.map(str))
    videos = videos.join(tests[["logit", "clip_file"]], on="name").dropna(subset=["logit"])
    return with_trivia(videos)


def degraded_reals(given: argparse.Namespace, videos: pd.DataFrame) -> pd.DataFrame:
    """`degraded_logits` of all real videos, each by the model of its fold."""
    parts = []
    for fold, reals in videos[videos.label == 0].groupby("fold"):
        model, _ = load_detector(folder_of(given, str(fold)) / "run/models/best_model.pth")
        parts.append(degraded_logits(model, reals))
    return pd.concat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--stills", type=Path, required=True)
    parser.add_argument("--initial", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/leave_out"))
    parser.add_argument("--final", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, with a thread each")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = parser.parse_args()
    given.output, given.corpus = given.output.resolve(), given.corpus.resolve()
    videos = left_out_scores(given)
    videos.drop(columns="clip_file").to_csv(given.output / "left_out_scores.csv", index=False)
    print_report(videos)
    calibration = calibrate(videos.logit.to_numpy(), videos.label.to_numpy())
    print_false_alarms(degraded_reals(given, videos), calibration)
    if given.final:
        write_final(given.output / "none/run/models/best_model.pth", calibration, given.final)


if __name__ == "__main__":
    main()
