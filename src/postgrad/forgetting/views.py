"""Sets of images as a classifier sees them: from pixels, or from the input of the first block that changes.

Letters: N images, B and C images of batches, D width of the features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier, Seen
from postgrad.forgetting.blocks import Block
from postgrad.forgetting.leakage import Pass
from postgrad.forgetting.leakage_audit import Views
from postgrad.forgetting.prefix import PROBED, PrefixCache, cache_prefix, cacheable, resumed, shortened

EVAL_IMAGES = 256
"""Images a forward pass without gradients."""


@dataclass(frozen=True, eq=False)
class View:
    """A classifier on a set of images, some of its first blocks computed once for all."""

    classifier: Classifier
    images: ImageSet
    blocks: Sequence[Block] = ()
    cached: PrefixCache | None = None

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def see(self, index: Int64[Tensor, " B"]) -> Seen:
        """Compute features and logits of some images."""
        if self.cached is None:
            seen: Seen = self.classifier(self._pixels(index))
            return seen
        return self._from(self.cached.rows(index))

    def see_with(self, index: Int64[Tensor, " B"], other: "View", others: Int64[Tensor, " C"]) -> tuple[Seen, Seen]:
        """Compute those of some images of this view and of another one in a single pass; both begin at one block."""
        if self.cached is None or other.cached is None:
            both: Seen = self.classifier(torch.cat([self._pixels(index), other._pixels(others)]))
        else:
            own = self.cached.rows(index)
            both = self._from(replace(own, states=torch.cat([own.states, other.cached.rows(others).states])))
        num = len(index)
        return Seen(both.features[:num], both.logits[:num]), Seen(both.features[num:], both.logits[num:])

    def _pixels(self, index: Int64[Tensor, " B"]) -> Tensor:
        return self.images.images[index.to(self.images.images.device)]

    def _from(self, rows: PrefixCache) -> Seen:
        """Enter the network with what was computed once."""
        with resumed(self.classifier.network, self.blocks, rows.k, rows):
            late: Seen = self.classifier(self.images.images[:1])  # its pixels only shape what is thrown away
        return late

    def labels(self, index: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
        """Give the labels of some images."""
        return self.images.labels[index.to(self.images.labels.device)]

    @torch.no_grad()
    def see_all(self) -> Seen:
        """Compute features and logits of all images, in evaluation mode, without gradients."""
        training = self.classifier.training
        self.classifier.eval()
        try:
            parts = [self.see(index) for index in torch.split(torch.arange(len(self)), EVAL_IMAGES)]
        finally:
            self.classifier.train(training)
        return Seen(torch.cat([part.features for part in parts]), torch.cat([part.logits for part in parts]))


def from_block(view: View, blocks: Sequence[Block], start: int) -> View:
    """Compute what comes before block `start` once for all; the view is unchanged where a network cannot be resumed."""
    network = view.classifier.network
    if start == 0 or not len(view) or not cacheable(network, blocks, start):
        return view
    cached = cache_prefix(network, blocks, start, view.images.images, view.classifier, batch_size=EVAL_IMAGES)
    cached = shortened(network, blocks, cached, _all_of(view.classifier), view.images.images[:PROBED])
    return View(view.classifier, view.images, blocks, cached)


def _all_of(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """Give what is read of a classifier, in one tensor."""

    def both(images: Tensor) -> Tensor:
        seen: Seen = classifier(images)
        return torch.cat([seen.features, seen.logits], dim=1)

    return both


def predictions(seen: Seen) -> Int64[Tensor, " N"]:
    """Give the likeliest class of each image."""
    return seen.logits.argmax(1)


def share_right(seen: Seen, labels: Int64[Tensor, " N"]) -> float:
    """Return the accuracy in percent; NaN without images."""
    return 100.0 * (predictions(seen) == labels).float().mean().item()


def class_means(features: Float[Tensor, "N D"], labels: Int64[Tensor, " N"], num: int) -> Float[Tensor, "K D"]:
    """Return the mean features of each class, 0 for a class without images."""
    sums = features.new_zeros(num, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num).clamp(min=1)[:, None]


def passes(classifier: Classifier, images: tuple[ImageSet, ImageSet]) -> Views:
    """Show a classifier the training and the test images, on the CPU, for the audit."""
    shown = []
    for part in images:
        seen = View(classifier, part).see_all()
        shown.append(Pass(seen.features.cpu(), seen.logits.cpu(), part.labels.cpu()))
    return Views(*shown)
