"""A four-class problem of 8x8 images, and a small classifier of blocks that solves it: the baselines' test bed."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from postgrad.core.runtime import Job
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier

CLASSES = ("a", "b", "c", "d")
FORGOTTEN = 1


class TinyBlock(nn.Module):
    """Two linear layers beside the mean of the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + tokens.mean(1, keepdim=True)
        out: Tensor = tokens + self.mlp(self.norm(tokens))
        return out


class TinyNetwork(nn.Module):
    """Rows of pixels as tokens, through blocks, averaged."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.embed(pixels[:, 0])
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens.mean(1)))
        return logits


def fresh(seed: int = 0) -> Classifier:
    """Draw a classifier that has learnt nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinyNetwork()
    return Classifier(network, "head", CLASSES, size=(8, 8))


def images(each: int, seed: int) -> ImageSet:
    """Draw so many images of each class: one of four patterns in noise."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, 2, (len(CLASSES), 1, 8, 8), generator=generator) * 100
    labels = torch.arange(len(CLASSES)).repeat(each)
    generator.manual_seed(seed)
    noise = torch.randint(0, 150, (len(labels), 1, 8, 8), generator=generator)
    return ImageSet((patterns[labels] + noise).to(torch.uint8), labels, CLASSES)


def taught(seed: int = 0) -> Classifier:
    """Train a classifier on images(16, 0)."""
    classifier, data = fresh(seed), images(16, 0)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(data.images).logits, data.labels).backward()
        optimizer.step()
    return classifier


def sides(data: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split into what is forgotten and what is kept."""
    return data.of_classes([FORGOTTEN]), data.of_classes([c for c in range(len(CLASSES)) if c != FORGOTTEN])


def accuracy(classifier: Classifier, data: ImageSet) -> float:
    """Give the share of images classified rightly."""
    with torch.no_grad():
        right: Tensor = classifier(data.images).logits.argmax(1) == data.labels
    return float(right.float().mean())


def weights(classifier: Classifier) -> dict[str, Tensor]:
    """Copy all weights."""
    return copy.deepcopy(dict(classifier.state_dict()))


def job(folder: Path, seed: int = 0) -> Job:
    """Make a run's frame without starting a run."""
    return Job("baselines", folder, seed, torch.device("cpu"), torch.float32, 0, 1, True)
