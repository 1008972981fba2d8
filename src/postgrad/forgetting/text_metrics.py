"""Figures of unlearning in language models, with the names and definitions of TOFU and OpenUnlearning.

Source:  TOFU (arXiv 2401.06121): probability, ROUGE-L recall, truth ratio, model utility, forget quality;
         OpenUnlearning (arXiv 2506.12618): extraction strength. As their code has it, the truth ratio takes the
         geometric mean of the wrong answers' probabilities where the paper's formula has the arithmetic one.
Differs: ROUGE-L compares whole words, without a stemmer; a letter is whatever Unicode calls one, not a to z alone. An
         answer whose last token is wrong has an extraction strength of 0, not of 1 / length.

Letters: S rows, J wrong answers of a row, N tokens.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

WORD = re.compile(r"[^\W_]+")


def probability(losses: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the probability of answers to the power 1 / length. Args: losses: nats a token."""
    return torch.exp(-losses)


def chosen_probability(right: Float[Tensor, " S"], wrong: Sequence[Sequence[float]]) -> Float[Tensor, " S"]:
    """Return the right answer's share of the probability of all answers offered. Args: losses in nats a token."""
    others = torch.stack([probability(torch.tensor(each, dtype=right.dtype)).sum() for each in wrong])
    return probability(right) / (probability(right) + others)


def truth_ratio(right: Float[Tensor, " S"], wrong: Sequence[Sequence[float]]) -> Float[Tensor, " S"]:
    """Return how much likelier wrong answers are than the right one: exp(loss of right - mean loss of wrong).

    Args: right: loss of the right answer (in other words, where there are some), nats a token. wrong: of wrong ones.
    """
    return torch.exp(right - torch.stack([torch.tensor(each, dtype=right.dtype).mean() for each in wrong]))


def even_truth(ratios: Float[Tensor, " S"]) -> float:
    """Sum up the truth ratios of rows to forget: 1 = right and wrong answers are equally likely, 0 = one never."""
    return float(torch.minimum(ratios, 1 / ratios.clamp(min=1e-10)).mean())


def told_truth(ratios: Float[Tensor, " S"]) -> float:
    """Sum up the truth ratios of rows to keep: 1 = wrong answers have no probability, 0 = they are as likely."""
    return float((1 - ratios).clamp(min=0).mean())


def words(text: str) -> list[str]:
    """Split a text into its words, in lower case."""
    return WORD.findall(text.lower())


def rouge_l_recall(said: str, answer: str) -> float:
    """Return the share of the answer's words that are said in their order (longest common subsequence), 0 to 1."""
    ours, theirs = words(said), words(answer)
    if not theirs:
        return float(not ours)
    row = [0] * (len(ours) + 1)
    for wanted in theirs:
        before = row
        row = [0]
        for at, word in enumerate(ours):
            row.append(before[at] + 1 if word == wanted else max(before[at + 1], row[at]))
    return row[-1] / len(theirs)


def extraction_strength(right: Float[Tensor, " N"], tokens: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Return the share of each answer that follows by itself once what is before it is given.

    Args: right: 1 where a token is the likeliest one after the right ones before it, else 0. tokens: of each answer.
    """
    found = []
    for each in torch.split(right, tokens.tolist()):
        wrong = (each < 1).nonzero()
        found.append(1 - (float(wrong[-1]) + 1) / len(each) if len(wrong) else 1.0)
    return torch.tensor(found, dtype=torch.float64)


def model_utility(figures: Sequence[float]) -> float:
    """Return the harmonic mean of figures from 0 to 1; 0 where one of them is 0."""
    return len(figures) / sum(1 / each for each in figures) if figures and min(figures) > 0 else 0.0


def forget_quality(ratios: Float[Tensor, " S"], gold: Float[Tensor, " S"]) -> float:
    """Return the p-value of a two-sample Kolmogorov-Smirnov test of truth ratios against gold's.

    Near 0 the two models are told apart; a high value says that they are not, not that they are the same.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(np.asarray(ratios), np.asarray(gold)).pvalue)
