"""How far a student is from its teacher: the terms by which baselines hold on to what is kept.

Each gives one number an image, so that a batch may be summed, averaged and split as its method says.

Source:  LwF (Li and Hoiem, arXiv 1606.09282), DER (Buzzega et al., arXiv 2004.07211), FDR (Benjamin et al.,
         arXiv 1805.08289), SCRUB (Kurmanji et al., arXiv 2302.09880), attention transfer (Zagoruyko and Komodakis,
         arXiv 1612.03928), and their variants in the released code of GS-LoRA (arXiv 2403.11530).
Differs: that code's LwF term is always 0. It is kept as `lwf_official_distance` beside the one that works.

Letters: B batch, K classes, D width, T tokens, M coordinates of an attention map.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from postgrad.core.numbers import full, root

FAINT = 0.005
"""Coordinates of an attention map below this count as 0."""


def kl_distance(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, temperature: float
) -> Float[Tensor, " B"]:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats.

    Source: SCRUB, after Hinton et al. 2015; T^2 keeps the size of the gradient.
    """
    target = F.log_softmax(full(teacher) / temperature, dim=1)
    answer = F.log_softmax(full(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(answer, target, reduction="none", log_target=True).sum(1)


def lwf_distance(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, temperature: float
) -> Float[Tensor, " B"]:
    """Return the cross entropy -sum_k p_k log q_k, p and q the softmax of teacher and student over the temperature.

    Source: LwF; raising probabilities to 1 / T and rescaling them is the softmax of the logits over T. No T^2.
    """
    target = F.softmax(full(teacher) / temperature, dim=1)
    return -(target * F.log_softmax(full(student) / temperature, dim=1)).sum(1)


def lwf_official_distance(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], *, temperature: float
) -> Float[Tensor, " B"]:
    """Return the LwF term as GS-LoRA's code computes it: 0, with gradient 0, whatever the logits.

    It takes the logarithm of log-probabilities, which are negative, and sets the resulting NaN to 0.
    """
    softened = [F.log_softmax(F.softmax(full(x), dim=1) ** (1 / temperature), dim=1) for x in (student, teacher)]
    answer, target = softened
    twice = answer.log()  # NaN throughout
    return -(target * torch.where(twice.isnan(), 0.0, twice)).sum(1)


def der_distance(student: Float[Tensor, "B D"], teacher: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Return the squared distance of two vectors, ||s - t||^2.

    Source:  DER compares logits and averages over images. GS-LoRA's code compares features and sums over the batch.
    """
    return (full(student) - full(teacher)).square().sum(1)


def fdr_distance(student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Return the distance of two vectors, ||s - t||; the gradient where they are equal is 0.

    Source:  FDR. GS-LoRA's code gives it logits; other code known to us gives it probabilities.
    """
    return root((full(student) - full(teacher)).square().sum(1))


def attention_map(hidden: Float[Tensor, "B T ..."], faint: float = FAINT) -> Float[Tensor, "B M"]:
    """Return where activations are large: the mean square over the second axis, scaled to length 1.

    Args:   hidden: of a transformer block, T tokens of width D = M; of a convolution, T channels of M pixels.
            faint: coordinates below are set to 0.
    """
    strength = F.normalize(full(hidden).square().mean(1).flatten(1))  # [B, M]
    return torch.where(strength < faint, 0.0, strength)


def attention_distance(student: Float[Tensor, "B M"], teacher: Float[Tensor, "B M"]) -> Float[Tensor, " B"]:
    """Return the mean squared difference of two attention maps, over their coordinates."""
    return (student - teacher).square().mean(1)
