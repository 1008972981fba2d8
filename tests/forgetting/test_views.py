"""Views: what is computed once for all gives what the whole network gives."""

import pytest
import torch
from tiny_digits import GONE, images, taught

from postgrad.core.layer_adapters import activate, initialise, inject, pairs
from postgrad.core.vision_models import Classifier, Seen
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.views import View, class_means, from_block, passes, predictions, share_right

INDEX = torch.tensor([7, 0, 7, 31])


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """A trained one, with an adapter on its last block that is no longer zero."""
    found = taught()
    last = ffn_blocks(found.network)[-1]
    inject(found.network, "one", last.linears, rank=2, alpha=2.0)
    initialise(found.network, "one", seed=0)
    activate(found.network, ["one"], trainable="one")
    with torch.no_grad():
        for _, b in pairs(found.network, "one").values():
            b.normal_(generator=torch.Generator().manual_seed(1))
    return found.eval()


@pytest.fixture(scope="module")
def plain(classifier: Classifier) -> View:
    return View(classifier, images()[0])


@pytest.fixture(scope="module")
def cached(classifier: Classifier, plain: View) -> View:
    blocks = ffn_blocks(classifier.network)
    found = from_block(plain, blocks, len(blocks) - 1)
    assert found.cached is not None and len(found) == len(plain)
    return found


def same(found: Seen, expected: Seen) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_cached_prefix_changes_nothing(plain: View, cached: View) -> None:
    same(cached.see(INDEX), plain.see(INDEX))
    same(cached.see_all(), plain.see_all())


def test_gradients_are_those_of_the_whole_network(plain: View, cached: View, classifier: Classifier) -> None:
    found = []
    for view in (plain, cached):
        classifier.zero_grad()
        view.see(INDEX).logits.square().sum().backward()
        found.append([matrix.grad.clone() for pair in pairs(classifier.network, "one").values() for matrix in pair])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_two_sets_in_one_pass_are_what_they_are_one_by_one(plain: View, cached: View, classifier: Classifier) -> None:
    gone = View(classifier, images()[0].of_classes(GONE))
    blocks = ffn_blocks(classifier.network)
    others = torch.tensor([5, 2])
    for first, second in ((plain, gone), (cached, from_block(gone, blocks, len(blocks) - 1))):
        kept, went = first.see_with(INDEX, second, others)
        assert (len(kept.logits), len(went.features)) == (4, 2)
        same(kept, plain.see(INDEX))
        same(went, gone.see(others))


def test_one_pass_is_one_call_of_the_network(plain: View, classifier: Classifier) -> None:
    calls: list[int] = []
    handle = classifier.network.register_forward_hook(lambda *_: calls.append(1))
    plain.see_with(INDEX, plain, INDEX)
    handle.remove()
    assert len(calls) == 1


def test_nothing_is_cached_before_the_first_block_or_without_images(plain: View) -> None:
    blocks = ffn_blocks(plain.classifier.network)
    assert from_block(plain, blocks, 0) is plain
    empty = View(plain.classifier, images()[0].select([]))
    assert from_block(empty, blocks, 2) is empty


def test_labels_go_with_their_images(plain: View) -> None:
    assert torch.equal(plain.labels(INDEX), images()[0].labels[INDEX])


def test_seeing_all_leaves_the_mode_and_needs_no_gradient(plain: View, classifier: Classifier) -> None:
    classifier.train()
    seen = plain.see_all()
    assert classifier.training and not seen.logits.requires_grad
    classifier.eval()
    assert seen.features.shape == (len(plain), 32)


def test_figures_by_hand() -> None:
    """Two of three right; the second class has the mean of its two rows, the third none."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    seen = Seen(features, logits)
    assert predictions(seen).tolist() == [0, 1, 2]
    assert share_right(seen, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3)
    means = class_means(features, torch.tensor([0, 1, 1]), 3)
    assert means.tolist() == [[1.0, 2.0], [4.0, 2.0], [0.0, 0.0]]


def test_without_images_there_is_no_accuracy() -> None:
    found = share_right(Seen(torch.zeros(0, 2), torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64))
    assert found != found


def test_the_audit_sees_both_splits(classifier: Classifier) -> None:
    train, test = images()
    views = passes(classifier, (train, test))
    assert torch.equal(views.train.labels, train.labels) and torch.equal(views.test.labels, test.labels)
    same(Seen(views.test.features, views.test.logits), View(classifier, test).see_all())
