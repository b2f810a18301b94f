"""Train on real footage, test on generators and sources that were left out.

    python tests/benchmarks/real_footage/leave_out.py CORPUS --stills STILLS --initial STAGE1.pth
        [--by sources] [--keep 0.5] [--output runs/leave_out] [--jobs 2] [--final MODEL.pth]
        [-p NAME VALUE]

CORPUS is what assemble.py brought; STILLS holds datasets of face crops (see docs/training.md). The
generators are dealt into four folds, whole families at a time; reals follow the fakes of their
group, and others the footage they came with. For each fold the notebook is run with
notebooks/params/finetune.yaml on the other three and on the stills, starting from stage one, and
tested on the fold. All videos are thus scored by models that know neither their people nor their
generator. With `--by sources`, whole repositories are dealt instead, with all that share people
with them: models know no source and nobody of their fold, but can know a generator from elsewhere.
Finished runs are kept.

`--keep` mixes so much of stage one's weights into the result (after Wortsman et al., 2022,
arXiv 2109.01903). `--final` then trains on everything and writes the model, in half precision,
calibrated on the scores of the left-out videos.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pandas as pd
import torch
from evaluate import (
    ROOT,
    cache_corpus,
    degraded_logits,
    find_corpus,
    print_degraded,
    print_report,
    score,
    with_trivia,
    write_final,
)

from cell_03_data_processing import ClipSettings
from cell_05_model_definition import load_detector
from cell_06_loss_and_utils import save_checkpoint
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


def source_of(videos: pd.DataFrame) -> pd.Series:
    """The repository of each video, as assemble.py puts it into the name of the file."""
    return videos.path.map(lambda path: re.sub(r"-[0-9a-f]{12}(-x\d+)?\.mp4$", "", path.name))


def assign_folds(videos: pd.DataFrame) -> pd.Series:
    """The fold of each video: that of its generator's family or group, else of its repository.

    A group with fakes of several folds is tested in the first, and its other videos nowhere.
    """
    videos = videos.assign(family=videos.method.map(family_of))
    fakes = videos[videos.label == 1]
    fold = videos.family.map(deal_families(fakes)).where(videos.label == 1)
    for key in (videos.group, source_of(videos)):
        fold = fold.fillna(key.map(fold.groupby(key).first()))
    in_turn = {name: FOLDS[i % 4] for i, name in enumerate(sorted({*videos.group}))}
    return fold.fillna(videos.group.map(in_turn))


def assign_sources(videos: pd.DataFrame) -> pd.Series:
    """The fold of each video: repositories that share people stay together, large ones first."""
    links = nx.Graph(zip("from " + source_of(videos), videos.group, strict=True))
    parts = {
        name: part for part, names in enumerate(nx.connected_components(links)) for name in names
    }
    part = videos.group.map(parts)
    folds, sizes = {}, dict.fromkeys(FOLDS, 0)
    for name, size in part.value_counts(sort=False).sort_values(ascending=False).items():
        folds[name] = fold = min(sizes, key=lambda fold: sizes[fold])
        sizes[fold] += size
    return part.map(folds)


def with_folds(videos: pd.DataFrame, by: str = "generators") -> pd.DataFrame:
    """The videos with their `fold`, and with groups as the corpus names them."""
    assign = assign_sources if by == "sources" else assign_folds
    return videos.assign(fold=assign(videos), group=videos.group.str.partition("/")[2])


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


def folder_of(given: argparse.Namespace, fold: str) -> Path:
    return given.output / re.sub(r"\W+", "_", fold)


def train(given: argparse.Namespace, videos: pd.DataFrame, fold: str) -> None:
    """Run the notebook, once, without a fold's videos; "none" leaves out none."""
    place = folder_of(given, fold)
    if (place / "run/results/test_predictions.csv").exists():
        return
    parameters = {
        "DATA_DIR": data_folder(place / "data", videos, fold, given.stills),
        "CACHE_DIR": given.corpus / "cache",
        "INITIAL_MODEL": given.initial.resolve(),
        "VAL_FRACTION": 0.02,
        "TEST_FRACTION": 0.01,
    } | dict(given.p)
    words = [word for name, value in parameters.items() for word in ("-p", name, value)]
    command = [sys.executable, ROOT / "build_notebook.py", "run", "finetune", *words]
    command += ["--output", place / "run"]
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([str(word) for word in command], check=True, env=environment)


def model_of(given: argparse.Namespace, fold: str) -> Path:
    """The model trained without a fold, with `--keep` of the weights it began with."""
    tuned = folder_of(given, fold) / "run/models/best_model.pth"
    if not given.keep:
        return tuned
    content, initial = (torch.load(file, weights_only=True) for file in (tuned, given.initial))
    for name, value in content["model"].items():
        if value.is_floating_point():
            value.lerp_(initial["model"][name].to(value), given.keep)
    content["offset"] += given.keep * (initial["offset"] - content["offset"])
    mixed = folder_of(given, fold) / f"kept_{given.keep:g}.pth"
    save_checkpoint(mixed, content)
    return mixed


def score_folds(
    given: argparse.Namespace, videos: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The videos with the logit of the model of their fold, and their `degraded_logits`."""
    scored, degraded = [], []
    for fold, part in videos.groupby("fold"):
        model, _ = load_detector(model_of(given, str(fold)))
        part = part.assign(logit=score(model, part))
        scored.append(part)
        degraded.append(degraded_logits(model, part))
    return with_trivia(pd.concat(scored)), pd.concat(degraded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--stills", type=Path, required=True)
    parser.add_argument("--initial", type=Path, required=True)
    parser.add_argument("--by", choices=("generators", "sources"), default="generators")
    parser.add_argument("--keep", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--output", type=Path, default=Path("runs/leave_out"))
    parser.add_argument("--final", type=Path)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once, each with its share of the cores"
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = parser.parse_args()
    given.output, given.corpus = given.output.resolve(), given.corpus.resolve()
    videos = with_folds(find_corpus(given.corpus), given.by)
    with ThreadPoolExecutor(given.jobs) as pool:
        folds = [*FOLDS, *(["none"] if given.final else [])]
        list(pool.map(partial(train, given, videos), folds))
    _, saved = load_detector(model_of(given, FOLDS[0]))
    settings = ClipSettings.of(SimpleNamespace(**saved["config"]))
    clips = cache_corpus(given.corpus, settings, given.jobs).set_index("path").clip_file
    videos = videos.assign(clip_file=videos.path.map(clips)).dropna(subset=["clip_file"])
    videos, degraded = score_folds(given, videos)
    videos.drop(columns="clip_file").to_csv(given.output / "left_out_scores.csv", index=False)
    print_report(videos)
    calibration = calibrate(videos.logit.to_numpy(), videos.label.to_numpy())
    print_degraded(videos, degraded, calibration)
    if given.final:
        write_final(model_of(given, "none"), calibration, given.final)


if __name__ == "__main__":
    main()
