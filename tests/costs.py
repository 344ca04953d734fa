"""What each test costs in seconds of a core: the dearest are listed, and a fast one that costs too much fails.

These are seconds of the worker and of the processes that it has waited for. They hardly depend on what else the machine
does, as seconds of a clock would. What tests/processes.py has forked is not among them.
"""

import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Generator

import pytest

# Some times what the dearest of the fast tests cost where it was chosen; a machine may be slower, and do other things.
MOST_S = 120.0  # what ends a server is charged with all that the server did for the tests before it
_NAME = "seconds of a core"
_SPENT = pytest.StashKey[float]()


class Costs:
    """With several workers each measures what it runs, and the process that started them adds up."""

    def __init__(self) -> None:
        self._of_tests: Counter[str] = Counter()
        self._left: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        item.stash[_SPENT] = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = spent()
        cost, item.stash[_SPENT] = now - item.stash[_SPENT], now
        report.user_properties = [(_NAME, cost)]
        if report.when == "call" and report.passed and cost > most_of(item):
            report.outcome = "failed"
            report.longrepr = (
                f"the test took {cost:.0f} s of a core, and it may take {most_of(item):.0f}: make it cheaper, or mark "
                "what only repeats another case with pytest.mark.slow"
            )
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._of_tests[report.nodeid] += sum(cost for name, cost in report.user_properties if name == _NAME)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A server whose socket was closed before it was shut down spins, and all later tests take twice the time."""
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output[_NAME] = spinning_threads()
        elif self._left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self._left += getattr(node, "workeroutput", {}).get(_NAME, [])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in self._left:
            terminalreporter.line(f"a thread that a test left behind spins: one of {name}", red=True)
        if len(self._of_tests) < 100:  # somebody runs a file
            return
        terminalreporter.section(f"dearest tests, {_NAME}")
        for name, cost in self._of_tests.most_common(10):
            terminalreporter.line(f"{cost:7.1f} {name}")
        total = sum(self._of_tests.values())
        terminalreporter.line(f"{total:7.1f} all {len(self._of_tests)}; besides, each worker has collected them")


def spent() -> float:
    """Seconds of a core that this process and its ended children have had."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def spinning_threads() -> list[str]:
    """The threads beside this one, where they use a core while nothing is to be done."""
    before = time.process_time()
    time.sleep(0.5)
    if time.process_time() - before < 0.05:
        return []
    return [", ".join(thread.name for thread in threading.enumerate() if thread is not threading.current_thread())]


def most_of(item: pytest.Item) -> float:
    """What a test may cost: only the workers of script/test hold the fast ones to it, on a CPU."""
    if "PYTEST_XDIST_WORKER" not in os.environ or item.get_closest_marker("slow"):
        return float("inf")
    own = item.get_closest_marker("may_cost")
    return own.args[0] if own else MOST_S
