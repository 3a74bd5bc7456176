"""The numbers of one held-out response."""

from cluster.evaluate import _values
from tests.cluster.watch.batches import response


def test_the_sum_is_a_number_of_its_own_where_there_is_something_to_sum():
    rollout = response([5, 6], "a", {}, reward=0.0).rollout
    alone = {"proxy": 2.0, "proxy/std": 0.5, "proxy/latent": 1.25}
    found = _values(rollout, (2.0, alone, "v1"), (0.0, {"judge": 0.75}, ""), [-1.5, -1.5])
    assert found == {
        "reward/proxy": 2.0,
        "reward/proxy/std": 0.5,
        "reward/proxy/latent": 1.25,
        "gold/judge": 0.75,
        "kl_to_reference": 1.0,
        "response_tokens": 2.0,
        "truncated_fraction": 0.0,
    }
    both = _values(rollout, (2.5, alone | {"other": 0.5}, "v1"), (0.0, {}, ""), [-1.5, -1.5])
    assert isinstance(both, dict)
    assert both["reward"] == 2.5
