"""Where a run can be watched beside its metrics.jsonl. The configuration's `logging` section says where."""

from cluster.trackers.started import start_trackers
from cluster.trackers.tracker import Tracker, Trackers

__all__ = ["Tracker", "Trackers", "start_trackers"]
