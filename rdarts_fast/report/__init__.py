"""Run folders as one page: what was searched, what was found, and the paper's figures over it.

python -m rdarts_fast.report runs/robust --out report
"""

from rdarts_fast.report.page import write_report

__all__ = ["write_report"]
