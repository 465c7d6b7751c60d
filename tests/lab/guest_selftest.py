#!/usr/bin/env python3
"""Tests of the guest lane itself: does it notice a test that fails, one that hangs and a program that dies, and is nothing left behind?

    guest_selftest.py [KERNEL]     default: the first of the lane's kernels
"""
import contextlib
import io
import os
import sys
import tempfile
import time
import traceback

import guest

# What libtest prints, from a program that fails, dies and hangs on purpose.
FAILS = """#!/bin/sh
echo "running 3 tests"
echo "test one ... ok"
echo "test two ... [painted over] FAILED"
echo "test result: FAILED. 1 passed; 1 failed; 0 ignored"
exit 101
"""
DIES = """#!/bin/sh
echo "test one ... ok"
kill -9 $$
"""
HANGS = """#!/bin/sh
echo "test one ... ok"
echo "test slow ... "
sleep 600
"""


def versions(_lab_dir, _kernel):
    assert guest.begins("6.1.0-56-cloud-amd64", "6.1") and not guest.begins("6.12.107+deb13-cloud-amd64", "6.1")
    assert guest.begins("7.3-cloud-amd64", "7") and guest.begins("7.3-cloud-amd64", "7.3")
    releases = ["7.2.13+deb14-cloud-amd64", "7.3.4+deb13-cloud-amd64", "7.2.9+deb13-cloud-amd64"]
    assert max(releases, key=guest.version) == releases[1]


def an_exit_code_comes_back(lab_dir, kernel):
    lines = []
    ended = guest.boot(lab_dir, kernel, [], "uname -r; nproc; exit 7\n", 5, 2, lines.append)
    assert ended.code == 7 and not ended.over, (ended.code, ended.over)
    assert lines == [os.path.basename(kernel), "2"], lines


def a_guest_that_does_not_come_up_is_told_so(lab_dir, kernel):
    usual = guest.UP_SECONDS
    guest.UP_SECONDS = 0.2
    try:
        ended = guest.boot(lab_dir, kernel, [], "exit 0\n", 5, 2, lambda line: None)
    finally:
        guest.UP_SECONDS = usual
    assert ended.code is None and not ended.up and "did not come up" in ended.why(5), vars(ended)


def failures_deaths_and_hangs_are_counted(lab_dir, kernel):
    with tempfile.TemporaryDirectory(dir=lab_dir) as here:
        binaries = {}
        for name, text in (("fails", FAILS), ("dies", DIES), ("hangs", HANGS)):
            binaries[name] = os.path.join(here, name)
            with open(binaries[name], "w", encoding="ascii") as file:
                file.write(text)
            os.chmod(binaries[name], 0o755)
        choices = {"fails": (["one", "two"], {"three": "why not"}), "dies": (["one"], {}), "hangs": (["one", "slow", "never"], {})}
        began = time.monotonic()
        # Kept to ourselves: planted failures in libtest's words are not to be taken for results.
        with contextlib.redirect_stdout(io.StringIO()):
            rows, ended = guest.run_tests(lab_dir, kernel, binaries, binaries["fails"], choices, 0.5, 2, False)
    assert ended.over and time.monotonic() - began < 90, "a hanging guest was not ended"
    fails, dies, hangs = rows
    assert (fails.passed, fails.failed, fails.unfinished) == (["one"], ["two"], []) and guest.bad(fails) == 1
    assert (dies.passed, dies.failed, dies.unfinished) == (["one"], [], []) and guest.bad(dies) == 1, dies.code
    assert (hangs.passed, hangs.unfinished) == (["one"], ["slow", "never"]) and guest.bad(hangs) == 2
    assert "left out: three (why not)" in guest.table(rows) and "not finished: slow" in guest.table(rows)


def nothing_is_left(lab_dir, _kernel):
    boots = os.path.join(lab_dir, "boots")
    mine = [name for name in os.listdir(boots) if not guest.held(os.path.join(boots, name))]
    assert mine == [], mine
    children = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == os.getpid()]
    assert children == [], children


def parent(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def main():
    word = sys.argv[1] if len(sys.argv) > 1 else guest.KERNELS[0]
    passed = failed = 0
    try:
        lab_dir = guest.directory()
        kernel = guest.Kernels(lab_dir).get(word, False)
    except guest.LabError as error:
        print(f"guest: {error}", file=sys.stderr)
        return 2
    for test in (versions, an_exit_code_comes_back, a_guest_that_does_not_come_up_is_told_so, failures_deaths_and_hangs_are_counted, nothing_is_left):
        began = time.monotonic()
        try:
            test(lab_dir, kernel)
            passed, word = passed + 1, "ok"
        except Exception:  # noqa: BLE001 - the next test still runs, this one is counted
            traceback.print_exc()
            failed, word = failed + 1, "FAILED"
        print(f"guest lane: {test.__name__} ... {word} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
