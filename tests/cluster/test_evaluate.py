"""The numbers of one held-out response."""

from cluster.evaluate import Evaluation, _values, compare, means
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


def test_a_reward_model_that_tells_more_may_be_rolled_out_while_prompts_are_scored():
    alone, more = {"reward/proxy": 1.0}, {"reward/proxy": 3.0, "reward/proxy/latent": 0.5}
    assert means([[alone, more], [more, more]]) == {"reward/proxy": [2.0, 3.0]}
    assert means([[more, more], [more, alone]]) == {"reward/proxy": [3.0, 2.0]}
    assert means([[more, more]]) == {"reward/proxy": [3.0], "reward/proxy/latent": [0.5]}
    assert means([]) == {}


def evaluated(version: int, values: dict[str, list[float]]) -> Evaluation:
    prompts = [f"p{row}" for row in range(3)]
    scores = [{name: column[row] for name, column in values.items()} for row in range(3)]
    return Evaluation(version, prompts, prompts, prompts, scores, dict.fromkeys(values, "proxy"), values)


def test_what_was_measured_once_is_not_compared():
    before = evaluated(0, {"reward/proxy": [0.0, 1.0, 2.0], "reward/proxy/std": [0.1, 0.1, 0.1]})
    after = evaluated(6, {"reward/proxy": [1.0, 2.0, 3.0], "reward/proxy/latent": [0.5, 0.5, 0.5]})
    (compared,) = compare(before, after, shown_samples=1)["metrics"]
    assert (compared["name"], compared["difference"]["mean"]) == ("reward/proxy", 1.0)
