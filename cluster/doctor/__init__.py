"""`headrace doctor`: what would hurt a run on this machine, and what to do about it.

Nothing in this package imports torch, ray or vllm, for a broken one is what it has to find.
"""

from cluster.doctor.diagnosis import diagnose, exit_status, print_findings
from cluster.doctor.finding import Finding

__all__ = ["Finding", "diagnose", "exit_status", "print_findings"]
