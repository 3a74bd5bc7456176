"""Members of an ensemble become one reward, as the configuration says."""

import pytest

from actors.ensemble import ensemble_rewards
from contracts.config import ConfigError
from contracts.loading import validate

MEMBERS = [[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]
STD = [(14 / 3) ** 0.5, 0.0]  # population deviations, by hand: (4 + 1 + 9) / 3


@pytest.mark.parametrize(
    ("rule", "std_weight", "expected"),
    [
        ("mean", 9.0, [3.0, 4.0]),
        ("minimum", 9.0, [1.0, 4.0]),
        ("mean_minus_std", 0.5, [3.0 - 0.5 * STD[0], 4.0]),
        ("mean_minus_std", 0.0, [3.0, 4.0]),
    ],
)
def test_what_members_become(rule, std_weight, expected):
    assert ensemble_rewards(MEMBERS, STD, rule=rule, std_weight=std_weight) == pytest.approx(expected)


def test_a_function_has_no_members():
    data = {"output_dir": "x", "model": {"path": "y"}, "prompts": {"path": "z"}}
    with pytest.raises(ConfigError, match="this component is a function"):
        validate(data | {"rewards": [{"name": "a", "function": "m:f", "ensemble": "minimum"}]}, source="here")
    validate(data | {"rewards": [{"name": "a", "model": "m", "ensemble": "mean_minus_std"}]}, source="here")
    with pytest.raises(ConfigError, match="std_weight"):
        validate(data | {"rewards": [{"name": "a", "model": "m", "std_weight": -1}]}, source="here")
