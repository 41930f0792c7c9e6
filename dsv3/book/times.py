"""A pytest plugin (``-p dsv3.book.times``): how long each notebook took, after an nbval run.

nbval makes one test of each cell. Their times, and that of starting the kernel, are added up by
notebook and printed, slowest first. Nothing is asserted: a busy machine is no mistake.
"""

from collections import Counter


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the sums. Called by pytest at the end of a run."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if ".ipynb::" in getattr(report, "nodeid", ""):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if seconds:
        terminalreporter.section("seconds a notebook took")
        for notebook, total in seconds.most_common():
            terminalreporter.write_line(f"{total:6.1f}  {notebook}")
        terminalreporter.write_line(f"{seconds.total():6.1f}  together")
