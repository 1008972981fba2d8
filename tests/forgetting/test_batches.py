"""The order of two streams: passes over the retained images, with those to forget going round beside them."""

import torch

from postgrad.forgetting.batches import Pair, PairBatches


def batches(num_retain: int = 10, num_forget: int = 5, *, size: int = 4, epochs: int = 3, seed: int = 7) -> PairBatches:
    return PairBatches(num_retain, num_forget, size, epochs, seed)


def epoch(found: PairBatches, number: int) -> list[Pair]:
    steps = range(number * found.epoch_steps, (number + 1) * found.epoch_steps)
    return [found[step][0] for step in steps]


def test_an_epoch_is_one_pass_over_the_retained_images() -> None:
    found = batches()
    assert (found.epoch_steps, len(found)) == (3, 9)
    orders = []
    for number in range(3):
        pairs = epoch(found, number)
        assert [len(pair.retain) for pair in pairs] == [4, 4, 2]
        orders.append(torch.cat([pair.retain for pair in pairs]).tolist())
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1] != orders[2]


def test_images_to_forget_go_round_and_begin_anew_with_each_epoch() -> None:
    """Five in batches of four: four, one, then the first four again."""
    orders = []
    for number in range(3):
        first, second, third = (pair.forget.tolist() for pair in epoch(batches(), number))
        assert sorted(first + second) == list(range(5)) and third == first
        orders.append(first + second)
    assert orders[0] != orders[1] != orders[2]


def test_with_fewer_retained_images_than_a_batch_the_larger_set_makes_the_epoch() -> None:
    found = batches(3, 9)
    assert found.epoch_steps == 3
    pairs = epoch(found, 0)
    assert sorted(torch.cat([pair.forget for pair in pairs]).tolist()) == list(range(9))
    assert all(sorted(pair.retain.tolist()) == [0, 1, 2] for pair in pairs)
    assert batches(3, 2).epoch_steps == 1


def test_ranks_share_a_step() -> None:
    whole = batches()
    for step in range(len(whole)):
        shares = [PairBatches(10, 5, 4, 3, 7, rank, 3)[step][0] for rank in range(3)]
        for name in ("retain", "forget"):
            dealt = torch.cat([vars(share)[name] for share in shares])
            assert set(dealt.tolist()) >= set(vars(whole[step][0])[name].tolist())
            assert len({len(vars(share)[name]) for share in shares}) == 1
            assert len(dealt) < len(vars(whole[step][0])[name]) + 3


def test_a_single_image_is_enough_for_every_rank() -> None:
    for rank in range(4):
        (pair,) = PairBatches(1, 1, 4, 1, 7, rank, 4)[0]
        assert pair.retain.tolist() == pair.forget.tolist() == [0]


def test_the_seed_alone_decides_and_the_two_orders_differ() -> None:
    one, two, other = batches(10, 10), batches(10, 10), batches(10, 10, seed=8)
    for step in reversed(range(len(one))):
        assert torch.equal(one[step][0].retain, two[step][0].retain)
        assert torch.equal(one[step][0].forget, two[step][0].forget)
    assert not torch.equal(one[0][0].retain, other[0][0].retain)
    assert not torch.equal(one[0][0].retain, one[0][0].forget)
