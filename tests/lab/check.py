#!/usr/bin/env python3
"""Runs the tests tier by tier, counts them, and writes target/check/TIER.json.

    check.py [lint] [unit] [crash] [kernel] [guests] [--long]     all but guests without a name; --long all

lint    format, clippy with warnings as errors, and the scripts' own syntax
unit    unit, property and integration tests that need no root, tests/house.rs among them
crash   tests/crash_*.rs, with debug assertions on: the planted wrong orders exist only there
kernel  tests/root_*.rs one at a time, the lab's own tests, the stories on two hosts, and a short demo, as root
guests  kernel tests of tracker, device and host on other kernels than this one, in an emulator; what was run and what not is in its JSON
"""
import glob
import os
import re
import signal
import subprocess
import sys
import threading
import time

import guest
import report
from lab import REPO, LabError, adopt_orphans

TIERS = ("lint", "unit", "crash", "kernel", "guests")
# Minutes of emulation: asked for by name, or with --long.
SELDOM = ("guests",)
RESULT = re.compile(r"^(?:test result: \w+\. )?(\d+) passed[;,] (\d+) failed")
IGNORED = re.compile(r"^test (\S+) \.\.\. ignored")
# Not tests: a maker of files and a measurement, run by hand. Whatever else is left out counts as a failure.
BY_HAND = {"make_golden", "throughput"}


class Tally:
    """What one tier counted."""

    def __init__(self, long):
        self.passed, self.failed, self.long, self.failures = 0, 0, long, []
        # What else belongs into the tier's JSON.
        self.more = {}

    def fail(self, what):
        self.failed += 1
        self.failures.append(what)
        print(f"FAILED: {what}", flush=True)


def run(argv, limit_seconds, on_line=None):
    """Runs a command in a process group of its own, its output shown as it comes. Gives its exit code; None after the limit."""
    print(f"$ {' '.join(argv)}", flush=True)
    child = subprocess.Popen(argv, cwd=REPO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if on_line else None, text=True,
                             errors="replace", start_new_session=True)
    over = threading.Event()

    def end():
        over.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(limit_seconds, end)
    timer.start()
    try:
        if on_line:
            for line in child.stdout:
                print(line, end="", flush=True)
                on_line(line.rstrip("\n"))
        code = child.wait()
    except BaseException:
        # Ctrl-C: the group's SIGTERM lets a test's guards tidy up, SIGKILL ends what will not.
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return None if over.is_set() else code


def plain(tally, what, argv, limit_seconds=1800):
    """A command that is one test."""
    code = run(argv, limit_seconds)
    if code == 0:
        tally.passed += 1
    else:
        tally.fail(f"{what} ({'took too long' if code is None else f'exit code {code}'})")


def harness(tally, what, argv, ignored_are_failures, limit_seconds=1800):
    """A command that prints libtest's results. One that ends badly without a failed test counts as one failure itself."""
    counts = {"passed": 0, "failed": 0, "results": 0}

    def line(text):
        found = RESULT.match(text)
        if found:
            counts["results"] += 1
            counts["passed"] += int(found[1])
            counts["failed"] += int(found[2])
            return
        found = IGNORED.match(text)
        if found and ignored_are_failures and found[1].rsplit("::", 1)[-1] not in BY_HAND:
            tally.fail(f"{what}: {found[1]} did not run")

    code = run(argv, limit_seconds * (8 if tally.long else 1), line)
    tally.passed += counts["passed"]
    if counts["failed"]:
        tally.failed += counts["failed"]
        tally.failures.append(f"{what}: {counts['failed']} tests")
    elif code != 0:
        tally.fail(f"{what} ({'took too long' if code is None else f'exit code {code}'})")
    elif counts["results"] == 0:
        tally.fail(f"{what} printed no result")
    return counts


def tests(pattern):
    return sorted(os.path.splitext(os.path.basename(file))[0] for file in glob.glob(os.path.join(REPO, "tests", pattern)))


def lint(tally):
    plain(tally, "cargo fmt", ["cargo", "fmt", "--check"])
    plain(tally, "cargo clippy", ["cargo", "clippy", "--locked", "--all-targets", "--", "-D", "warnings"])
    for script in ["dev", ".ci/run"] + glob.glob("tests/lab/*.sh", root_dir=REPO):
        plain(tally, f"{script} is no shell script", ["bash", "-n", script])
    for script in glob.glob("tests/**/*.py", root_dir=REPO, recursive=True) + glob.glob("benches/*.py", root_dir=REPO):
        plain(tally, f"{script} is no Python", [sys.executable, "-c", "import sys; compile(open(sys.argv[1]).read(), sys.argv[1], 'exec')", script])


def unit(tally):
    named = [name for name in tests("*.rs") if not name.startswith(("root_", "crash_"))]
    selection = ["--lib", "--bins"] + [word for name in named for word in ("--test", name)]
    harness(tally, "unit", ["cargo", "test", "--locked", "--no-fail-fast"] + selection, True)
    harness(tally, "documentation examples", ["cargo", "test", "--locked", "--doc"], False)


def crash(tally):
    named = tests("crash_*.rs")
    if not named:
        tally.fail("there is no tests/crash_*.rs: nothing was shown")
        return
    selection = [word for name in named for word in ("--test", name)]
    harness(tally, "crash", ["cargo", "test", "--locked", "--no-fail-fast"] + selection, True)


def kernel(tally):
    if os.geteuid() != 0:
        tally.fail("the kernel tier needs root: run sudo ./dev check kernel")
        return
    harness(tally, "lab", ["/usr/bin/python3", "-B", "tests/lab/selftest.py"], True)
    plain(tally, "the release build", ["cargo", "build", "--release", "--locked"])
    long = ["--long"] if tally.long else []
    harness(tally, "stories", ["/usr/bin/python3", "-B", "tests/lab/stories.py"] + long, True, 900)
    plain(tally, "demo", ["/usr/bin/python3", "-B", "tests/lab/demo.py", "--seconds", "10"], 600)
    named = tests("root_*.rs")
    if not named:
        tally.fail("there is no tests/root_*.rs: nothing was shown")
    for name in named:
        # --include-ignored: every test of the file runs, whether or not somebody forgot to mark it as needing root.
        counts = harness(tally, name, ["cargo", "test", "--locked", "--test", name, "--", "--include-ignored", "--test-threads=1"], True)
        if counts["results"] and counts["passed"] + counts["failed"] == 0:
            tally.fail(f"{name} holds no test")


def guests(tally):
    plain(tally, "the guest lane's own tests", ["/usr/bin/python3", "-B", "tests/lab/guest_selftest.py"], 600)
    rows = []
    for kernel in guest.KERNELS:
        try:
            rows += guest.lane([kernel], minutes=60 if tally.long else 20)
        except LabError as error:
            tally.fail(f"Linux {kernel}: {error}")
    for row in rows:
        tally.passed += len(row.passed)
        if guest.bad(row):
            tally.failed += guest.bad(row)
            tally.failures.append(f"{row.kernel}: {row.name}: {', '.join(row.failed + row.unfinished) or f'ended with {row.code}'}")
    tally.more = {"runs": guest.figures(rows)}
    print(guest.table(rows), flush=True)


def main():
    words = sys.argv[1:]
    if "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    long = "--long" in words
    names = [word for word in words if word != "--long"]
    unknown = [name for name in names if name not in TIERS]
    if unknown:
        print(f"check: there is no tier {unknown[0]}; the tiers are {', '.join(TIERS)}", file=sys.stderr)
        return 2
    if long:
        os.environ["DOUBLURE_LONG"] = "1"
    os.environ.setdefault("CARGO_TERM_COLOR", "never")
    adopt_orphans()

    def stop(number, _frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    passed = failed = 0
    lines = []
    for name in [tier for tier in TIERS if tier in names or (not names and (long or tier not in SELDOM))]:
        print(f"==== {name}", flush=True)
        tally, began = Tally(long), time.monotonic()
        {"lint": lint, "unit": unit, "crash": crash, "kernel": kernel, "guests": guests}[name](tally)
        seconds = round(time.monotonic() - began, 1)
        report.write(REPO, f"target/check/{name}.json", {"passed": tally.passed, "failed": tally.failed, "seconds": seconds, **tally.more})
        lines += [f"{name:<8} {tally.passed:5} passed  {tally.failed:3} failed  {seconds:7.1f} s"]
        lines += [f"         {what}" for what in tally.failures]
        passed, failed = passed + tally.passed, failed + tally.failed
    report.give_back(REPO)
    print("\n".join(["===="] + lines))
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as error:
        print(f"\ncheck: stopped by {str(error) or 'Ctrl-C'}", file=sys.stderr)
        sys.exit(130)
