"""What the measurements share: the lab with one protected volume, fio, medians, and the table and JSON at the end.

Figures are ratios within one run wherever the design asks for them: the machine is shared and noisy, so each figure is the
median of several rounds, and the rounds of what is compared alternate.
"""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(REPO, "tests", "lab"))
import report  # noqa: E402
from lab import AGENT_PORT, HOSTS, LabError, adopt_orphans, wait_for, whole_lab  # noqa: E402

GROUP = "bench"


def say(text):
    print(text, flush=True)


def verb(lab, host, *argv, good=(0,), timeout=900, stdin=None):
    """A verb with --json: its value, and how long the command took in seconds."""
    began = time.monotonic()
    done = lab.doublure(host, list(argv) + ["--json"], check=False, timeout=timeout, stdin=stdin)
    took = time.monotonic() - began
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode not in good or not lines:
        raise LabError(f"doublure {' '.join(argv)} on {host} ended with {done.returncode}: {(lines or [done.stderr])[-1]}")
    return json.loads(lines[-1]), took


def group(lab, host="alpha"):
    value, _ = verb(lab, host, "status", good=(0, 4))
    for row in value["groups"]:
        if row["name"] == GROUP:
            return row
    raise LabError(f"{host} does not know group {GROUP}")


@contextlib.contextmanager
def pair(extra=""):
    """Both hosts with their agents, paired."""
    adopt_orphans()
    with whole_lab() as lab:
        lab.agents = {}
        for host in HOSTS:
            lab.agents[host] = lab.agent(host, extra)
        opened, _ = verb(lab, "beta", "pair")
        verb(lab, "alpha", "pair", f"{HOSTS['beta'][0]}:{AGENT_PORT}", stdin=opened["code"] + "\n")
        yield lab


def restart(lab, host, extra):
    """Ends a host's agent as systemd would and starts it with other settings."""
    lab.exec(host, ["kill", "-TERM", str(lab.agents[host])])
    wait_for(f"the end of {host}'s agent", 30, lambda: not lab.alive(host, lab.agents[host]), 0.1)
    lab.agents[host] = lab.agent(host, extra)


def volume(lab, name, size):
    """A volume and its device and image on alpha."""
    made, _ = verb(lab, "alpha", "volume", "create", name, "--size", size)
    rows, _ = verb(lab, "alpha", "volume", "list")
    row = next(r for r in rows["volumes"] if r["name"] == name)
    return made, row["device"], row["image"]


def synced(lab, patience=900):
    wait_for("the first sync", patience, lambda: group(lab)["in_sync"], 0.2)


def fio(lab, path, *options, host="alpha"):
    """One fio job in a host, as fio's own JSON."""
    done = lab.exec(host, ["fio", "--output-format=json", "--name=job", f"--filename={path}", "--ioengine=io_uring",
                           "--allow_file_create=1", *options], timeout=900)
    return json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]


def resident_bytes(lab, host):
    """Resident memory of a host's agent: anonymous and file-backed, from the kernel."""
    status = lab.exec(host, ["cat", f"/proc/{lab.agents[host]}/status"]).stdout
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}


def median(values):
    return statistics.median(values)


def machine_is_loop(path):
    return subprocess.run(["losetup", "--noheadings", "-O", "DIO", path], capture_output=True, text=True).stdout.strip()


def finish(name, figures):
    """The table for people, the JSON for programs."""
    width = max(len(key) for key in figures)
    say("")
    for key, value in figures.items():
        shown = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        say(f"  {key:<{width}}  {shown}")
    say(f"\n  written to {os.path.relpath(report.write(REPO, f'target/bench/{name}.json', figures), REPO)}")
    report.give_back(REPO)


def main(work):
    try:
        work()
    except (LabError, KeyboardInterrupt) as error:
        say(f"bench: {error}")
        return 1
    return 0
