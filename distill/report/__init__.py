"""The page about a run, from the files that it wrote; `python -m distill.report` writes it anew.

In: a run's folder. Out: one self-contained HTML page.
"""

from distill.report.page import report_page

__all__ = ["report_page"]
