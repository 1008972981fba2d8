"""What keeps weights near those of the original model, and how much each of them matters.

Formula: penalty = sum_i w_i (theta_i - theta0_i)^2
         L2: w = 1.  EWC: w = E[(d log p(y | x) / d theta)^2].  MAS: w = E[|d ||f(x)||^2 / d theta|], f the logits.
Source:  EWC (Kirkpatrick et al., arXiv 1612.00796), MAS (Aljundi et al., arXiv 1711.09601), and GS-LoRA's released
         code (arXiv 2403.11530).
Differs: expectations are over mini-batches, as in that code, which is a batch size faster than over images: EWC takes
         n g^2 of a batch of n with mean gradient g, unbiased where the gradient is 0 on average; MAS takes the absolute
         gradient of the mean of f^2 over batch and classes. `batch_size=1` gives the papers' (MAS's over classes).
         EWC's paper multiplies the penalty by 1/2; that code does not, and neither does this.

Letters: B batch, K classes.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.core.numbers import full, root
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier

Weights = Mapping[str, Tensor]
"""Tensors under the names of the parameters they belong to."""
Score = Callable[[Float[Tensor, "B K"], Int[Tensor, " B"]], Float[Tensor, ""]]


def penalty(weights: Weights, anchor: Weights, importance: Weights) -> Float[Tensor, ""]:
    """Return sum_i importance_i (weights_i - anchor_i)^2 over all tensors of `importance`."""
    terms = [(importance[name] * (weights[name] - anchor[name]).square()).sum() for name in importance]
    return torch.stack(terms).sum()


def drift(weights: Weights, anchor: Weights) -> Float[Tensor, ""]:
    """Return the sum over tensors of the distances ||weights - anchor||; where they are equal its gradient is 0.

    Source: SCRUB's smoothing, with a running average of the weights as the anchor.
    """
    terms = [root((weights[name] - anchor[name]).square().sum()) for name in anchor]
    return torch.stack(terms).sum()


def l2_importance(weights: Weights) -> dict[str, Tensor]:
    """Hold all weights equally."""
    return {name: torch.ones_like(value) for name, value in weights.items()}


def ewc_importance(classifier: Classifier, data: ImageSet, batch_size: int) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information at the images' own labels."""
    return gradient_mean(classifier, data, batch_size, F.cross_entropy, lambda g, num: num * g.square())


def mas_importance(classifier: Classifier, data: ImageSet, batch_size: int) -> dict[str, Tensor]:
    """Estimate how strongly weights move the logits; labels do not matter."""
    return gradient_mean(classifier, data, batch_size, lambda logits, _: logits.square().mean(), lambda g, _: g.abs())


def gradient_mean(
    classifier: Classifier, data: ImageSet, batch_size: int, score: Score, change: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """Average a function of mini-batch gradients over the batches, for each parameter that trains.

    Args:    score: (logits, labels) -> what is differentiated.   change: (gradient, images of the batch) -> summand.
    Returns: on the parameters' device; 0 where the score does not depend on a parameter. No `.grad` is touched, and
             the classifier is in evaluation mode meanwhile.
    """
    named = {name: param for name, param in classifier.named_parameters() if param.requires_grad}
    total = {name: torch.zeros_like(param) for name, param in named.items()}
    device = next(iter(named.values())).device
    batches = torch.split(torch.arange(len(data)), batch_size)
    training = classifier.training
    classifier.eval()
    for places in batches:
        batch = data.select(places).to(device)
        value = score(full(classifier(batch.images).logits), batch.labels)
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for own, gradient in zip(total.values(), found, strict=True):
            if gradient is not None:
                own.add_(change(gradient, len(places)), alpha=1 / len(batches))
    classifier.train(training)
    return total
