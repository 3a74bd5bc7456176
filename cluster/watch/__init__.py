"""The watch on over-optimisation: whether a policy that climbs its reward still does what the reward stands for.

`signals` measures each response, `reference` what is usual, `triggers` decides when that is an alarm, `watching` joins
them step by step, `acting` carries the consequence out.
"""

from cluster.watch.acting import act, look, look_back, roll_back, roll_back_if_asked
from cluster.watch.watching import Watch, watch_of

__all__ = ["Watch", "act", "look", "look_back", "roll_back", "roll_back_if_asked", "watch_of"]
