"""The page about a run, from the files that it wrote; `python -m distill.report` writes it anew.

In: a run's folder. Out: one self-contained HTML page.
"""

from distill.report.figures import MAIN_SET, before_and_after, figure_in_words, figures_of, metric_rows, shown_figures
from distill.report.page import report_page

__all__ = [
    "MAIN_SET",
    "before_and_after",
    "figure_in_words",
    "figures_of",
    "metric_rows",
    "report_page",
    "shown_figures",
]
