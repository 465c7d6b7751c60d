#!/usr/bin/env python3
"""The tracker at scale: time of a mark, memory of bitmaps, flips of 1,000 volumes. Needs root; takes some minutes."""
import json
import os
import subprocess
import sys

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(REPO, "tests", "lab"))
import report  # noqa: E402


def main():
    done = subprocess.run(["cargo", "bench", "--locked", "--quiet", "--bench", "tracker"], cwd=REPO, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print("bench: the tracker's bench failed, its words stand above")
        return 1
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    width = max(len(key) for key in figures)
    print()
    for key, value in figures.items():
        print(f"  {key:<{width}}  {value:,.1f}")
    print(f"\n  written to {os.path.relpath(report.write(REPO, 'target/bench/scale.json', figures), REPO)}")
    report.give_back(REPO)
    return 0


sys.exit(main())
