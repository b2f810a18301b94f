"""Make fakes that differ from their real pictures in nothing but a generator's decoder.

    python tests/benchmarks/real_footage/reconstruct.py STILLS FOLDER [--mirrors FOLDER_OF_MIRRORS]
        [--pairs 3000] [--seed 0]

STILLS is what stills.py brought. Each fake is a real picture, or its face or mouth alone, encoded
and decoded by the tiny autoencoder of madebyollin/taesd (MIT) for the latents of FLUX.2, most with
some noise on the latents: what latent diffusion leaves in a picture, without its prompt (after
Rajan et al., 2025, arXiv 2410.11835). Both are written at the same size, 96 to 192 pixels, with the
same compression, as a dataset with a manifest.csv. A pair takes 0.4 s of one core.
"""

import argparse
import io
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from assemble import git_folder
from torch import nn

TAESD, SIZES = "madebyollin/taesd", (96, 128, 160, 192)


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Block(nn.Module):
    """Three convolutions of 64 channels and a skip; the names are those of the weights' file."""

    def __init__(self, pooled: bool):
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
        wide = (nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU())
        self.pool = nn.Sequential(*wide, nn.Conv2d(256, 64, 1, bias=False)) if pooled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Squash(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


def encoder() -> nn.Sequential:
    """Pictures (B, 3, S, S) in 0..1 to latents (B, 32, S / 8, S / 8)."""
    layers: list[nn.Module] = [conv(3, 64), Block(False)]
    for level in range(3):
        layers += [conv(64, 64, stride=2, bias=False), *(Block(level == 2) for _ in range(3))]
    return nn.Sequential(*layers, conv(64, 32))


def decoder() -> nn.Sequential:
    """Latents (B, 32, S, S) to pictures (B, 3, 8 S, 8 S), about 0..1."""
    layers: list[nn.Module] = [Squash(), conv(32, 64), nn.ReLU()]
    for level in range(3):
        layers += [*(Block(level == 0) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [conv(64, 64, bias=False)]
    return nn.Sequential(*layers, Block(False), conv(64, 3))


def load(git: Path, name: str, model: nn.Sequential) -> nn.Sequential:
    command = ["git", "--git-dir", str(git), "show", f"HEAD:taef2_{name}.pth"]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    model.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return model.float().eval()


def soft_mask(random: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 1): 1 everywhere, or in an ellipse or box about the face or the mouth."""
    part = random.choice(["whole", "face", "mouth"], p=[0.4, 0.35, 0.25])
    if part == "whole":
        return np.ones((size, size, 1), np.float32)
    y, x = np.mgrid[:size, :size] / size - 0.5
    y -= random.normal(*((0.24, 0.03) if part == "mouth" else (0.02, 0.04)))
    x -= random.normal(0, 0.03)
    y /= random.uniform(*((0.2, 0.34) if part == "mouth" else (0.3, 0.45)))
    x /= random.uniform(0.22, 0.36)
    distance = np.maximum(abs(x), abs(y)) if random.random() < 0.3 else np.hypot(x, y)
    return np.clip((1 - distance) / random.uniform(0.02, 0.3) + 0.5, 0, 1)[..., None]


@torch.inference_mode()
def reconstruct(
    networks: tuple[nn.Module, nn.Module], picture: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """A picture (S, S, 3), uint8, S a multiple of 8, encoded and decoded."""
    pixels = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    latents = networks[0](pixels)
    if random.random() < 0.7:
        noise = random.standard_normal(latents.shape, np.float32)
        scale = latents.std((2, 3), keepdim=True) * random.uniform(0, 0.3)
        latents = latents + scale * torch.from_numpy(noise)
    pixels = networks[1](latents).clamp(0, 1)[0].permute(1, 2, 0)
    return 255 * pixels.numpy()[..., ::-1]


def real_pictures(stills: Path, pairs: int, random: np.random.Generator) -> list[Path]:
    """Three fifths of DFDC, the others of UTKFace, in random order."""
    table = pd.read_csv(stills / "dfdc" / "metadata.csv")
    names = table.videoname[table.label == "REAL"].str.replace(".mp4", ".jpg", regex=False)
    dfdc = [stills / "dfdc" / "faces_224" / name for name in sorted(names)]
    utkface = sorted((stills / "utkface" / "real").glob("*.jpg"))
    first = random.permutation(len(dfdc))[: pairs * 3 // 5]
    second = random.permutation(len(utkface))[: pairs - len(first)]
    chosen = [dfdc[i] for i in first] + [utkface[i] for i in second]
    return [chosen[i] for i in random.permutation(len(chosen))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stills", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mirrors", type=Path)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as clones:
        git = git_folder(TAESD, given.mirrors, Path(clones))
        if git is None:
            raise SystemExit(f"{TAESD} is not there")
        networks = load(git, "encoder", encoder()), load(git, "decoder", decoder())
    random, rows = np.random.default_rng(given.seed), []
    faces = given.folder / "faces"
    faces.mkdir(parents=True, exist_ok=True)
    for file in real_pictures(given.stills, given.pairs, random):
        size = int(random.choice(SIZES, p=[0.25, 0.35, 0.25, 0.15]))
        real = cv2.resize(cv2.imread(str(file)), (size, size), interpolation=cv2.INTER_AREA)
        mask = soft_mask(random, size)
        fake = real * (1 - mask) + mask * reconstruct(networks, real, random)
        for end, picture in (("r", real), ("f", fake.round().astype(np.uint8))):
            name = str(faces / f"{file.stem}{end}.jpg")
            cv2.imwrite(name, picture, [cv2.IMWRITE_JPEG_QUALITY, 96])
        rows.append((f"faces/{file.stem}r.jpg", "real", "real", file.stem))
        rows.append((f"faces/{file.stem}f.jpg", "fake", "TAEF2", file.stem))
        if len(rows) % 1000 == 0:
            print(f"{len(rows) // 2} pairs", flush=True)
    table = pd.DataFrame(rows, columns=["path", "label", "method", "group"])
    table.to_csv(given.folder / "manifest.csv", index=False)


if __name__ == "__main__":
    main()
