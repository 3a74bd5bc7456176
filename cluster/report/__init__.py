"""report.html, what a run did on one page, and its comparison of before and after for the terminal.

`run_files` reads what the run left, `sentences` says what its numbers mean, `curves` draws the metrics, `page` puts
them together.
"""

from cluster.report.page import write_report
from cluster.report.sentences import evaluation_table

__all__ = ["evaluation_table", "write_report"]
