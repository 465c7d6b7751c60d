#!/usr/bin/env python3
"""The main job, once, on real parts: from a write in a container to that container running on the standby.

    demo.py [--seconds N]     N: how long the client writes under replication before the power cut (default 30)

`./dev demo` builds first and then runs this. Exit 0 only when the rows are a gapless prefix, nothing that was reported
recoverable is missing and pg_amcheck is clean.
"""
import argparse
import atexit
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import report
import service
from lab import AGENT_PORT, HOSTS, REPO, LabError, adopt_orphans, wait_for, whole_lab

GROUP = "shop"
HEALTH_PATIENCE = 120


def say(text):
    print(text, flush=True)


class Steps:
    """Prints each step with its time, so that a slow one is seen."""

    def __init__(self):
        self.began = time.monotonic()

    def __call__(self, text, work, *arguments):
        print(f"  {text} ... ", end="", flush=True)
        began = time.monotonic()
        try:
            value = work(*arguments)
        except BaseException:
            print("FAILED", flush=True)
            raise
        print(f"{time.monotonic() - began:.1f} s", flush=True)
        return value


def instant(value):
    """A time of `status` in wall-clock seconds: RFC 3339. None stays None: unknown is unknown."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", str(value))
    if not found:
        raise LabError(f"status shows a time that is not RFC 3339: {value!r}")
    whole = datetime.datetime.fromisoformat(found[1] + ("+00:00" if found[3] == "Z" else found[3])).timestamp()
    return whole + float(found[2] or 0)


def answer(done):
    """The JSON value that a command printed."""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if not lines:
        raise LabError(f"no answer: {(done.stderr.strip() or 'nothing on standard error either').splitlines()[-1]}")
    try:
        return json.loads(lines[-1])
    except ValueError:
        return json.loads(done.stdout)


def ask(lab, host, *argv, good=(0,), timeout=120, stdin=None):
    """Runs a verb with --json; LabError with its own words when its exit code is not a good one."""
    done = lab.doublure(host, list(argv) + ["--json"], check=False, timeout=timeout, stdin=stdin)
    if done.returncode not in good:
        words = (done.stdout.strip() or done.stderr.strip() or "no word").splitlines()[-1]
        raise LabError(f"doublure {' '.join(argv)} on {host} ended with {done.returncode}: {words}")
    return answer(done)


def group_of(status):
    for group in status.get("groups", []):
        if group.get("name") == GROUP:
            return group
    raise LabError(f"status does not know the group {GROUP}")


def status_of(lab, host):
    # 4: it answers, and something is degraded. That is an answer.
    return group_of(ask(lab, host, "status", good=(0, 4), timeout=30))


def pair(lab):
    """A code on beta, typed on alpha through standard input: never in argv."""
    opened = ask(lab, "beta", "pair")
    code = opened.get("code") if isinstance(opened, dict) else None
    if not code:
        raise LabError("doublure pair on beta gave no code")
    ask(lab, "alpha", "pair", f"{HOSTS['beta'][0]}:{AGENT_PORT}", stdin=f"{code}\n")


def await_sync(lab):
    """Waits until everything needed on the day is on the standby: every volume, every image, and a generation to promote."""
    group = {}

    def there():
        nonlocal group
        group = status_of(lab, "alpha")
        volumes, images = group.get("volumes", []), group.get("images", [])
        return volumes and all(v.get("in_sync") is True for v in volumes) and \
            images and all(i.get("on_standby") is True for i in images) and group.get("recoverable_to") is not None

    try:
        wait_for("the first sync of volume and image", 180, there, 0.2)
    except LabError as error:
        raise LabError(f"{error}; the last status of the group: {json.dumps(group)}") from None


class Watch(threading.Thread):
    """Asks alpha for its status all the time, as monitoring would, and keeps the last answer that came back whole."""

    def __init__(self, lab):
        super().__init__(daemon=True)
        self.lab, self.done, self.last, self.trouble, self.promises = lab, threading.Event(), None, None, []

    def run(self):
        while not self.done.is_set():
            try:
                group = status_of(self.lab, "alpha")
                at, until = time.time(), instant(group.get("recoverable_to"))
                if self.done.is_set():
                    return
                self.last = (at, group, until)
                if until is not None:
                    self.promises.append(at - until)
            except (LabError, OSError, ValueError) as error:
                self.trouble = str(error)
            self.done.wait(0.25)


def size(count):
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return None


def live(writer, watch, seconds):
    """One line a second: what the client has and what doublure promises."""
    say(f"  {'time':>6}  {'rows':>8}  {'generation':>10}  {'recoverable to':>14}  {'dirty':>10}  state")
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(1)
        if writer.process.poll() is not None:
            raise LabError("the client ended before the power cut")
        shown = f"  {time.monotonic() - began:5.0f}s  {writer.rows():8d}"
        if watch.last is None:
            say(f"{shown}  {watch.trouble or 'no status yet'}")
            continue
        _, group, until = watch.last
        ago = "unknown" if until is None else f"{time.time() - until:.2f} s ago"
        dirty = sum(v.get("dirty_bytes") or 0 for v in group.get("volumes", []))
        say(f"{shown}  {group.get('generation', '?'):>10}  {ago:>14}  {size(dirty):>10}  {group.get('state') or group.get('mode') or ''}")


def steps_of(value):
    """The list of steps in a failover's answer, wherever it stands."""
    if isinstance(value, dict):
        if isinstance(value.get("steps"), list):
            return value["steps"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            found = steps_of(item)
            if found:
                return found
    return []


def failover(lab):
    """Failover on beta, and a client that asks all the while when PostgreSQL answers. Gives (figures, answer)."""
    waiter = lab.start("waiter", lab.enter("wire") + service.client("await", "beta", str(HEALTH_PATIENCE)),
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        began = time.monotonic()
        value = ask(lab, "beta", "failover", GROUP, timeout=HEALTH_PATIENCE + 60)
        returned = time.monotonic()
        out, err = waiter.communicate(timeout=HEALTH_PATIENCE)
        if waiter.returncode != 0:
            raise LabError(f"PostgreSQL on beta does not answer: {err.strip()}")
    finally:
        if waiter.poll() is None:
            waiter.kill()
            waiter.wait()
        lab.record("waiter", None)
    figures = {"rto_ms": round((float(out) - began) * 1000, 1), "rto_command_ms": round((returned - began) * 1000, 1)}
    for step in steps_of(value):
        key = f"rto_{re.sub(r'[^a-z0-9]+', '_', str(step.get('name', '')).lower()).strip('_')}_ms"
        figures[key] = figures.get(key, 0) + (step.get("ms") or 0)
    return figures, value


def counters(group, *names):
    held = (group or {}).get("counters") or {}
    return {name: held.get(name) for name in names}


def table(figures, steps):
    def ms(key):
        value = figures.get(key)
        return "unknown" if value is None else f"{value:.0f} ms"

    rows = [
        ("RPO promised at the cut (last status before it)", ms("rpo_reported_ms")),
        ("RPO promised, worst seen", ms("rpo_reported_max_ms")),
        ("RPO found (age of the oldest lost commit)", ms("rpo_found_ms")),
        ("RTO: command to PostgreSQL's answer", ms("rto_ms")),
    ]
    for step in steps:
        rows.append((f"   {step.get('name')} ({step.get('outcome')})", f"{step.get('ms')} ms"))
    rows += [
        ("rows acknowledged / present / lost", f"{figures['rows_acknowledged']} / {figures['rows_present']} / {figures['rows_lost']}"),
        ("rows a gapless prefix", "yes" if figures["rows_gapless"] else "NO"),
        ("rows reported safe but lost", str(figures["rows_reported_safe_but_lost"])),
        ("pg_amcheck", "clean" if figures["amcheck_clean"] else "NOT CLEAN"),
        ("bytes changed / read", f"{size(figures['bytes_changed'])} / {size(figures['bytes_read'])}"),
        ("bytes sent / written on the standby", f"{size(figures['bytes_sent'])} / {size(figures['bytes_written'])}"),
        ("cycle p50 / p99", f"{ms('cycle_p50_ms')} / {ms('cycle_p99_ms')}"),
        ("cut", figures.get("cut") or "unknown"),
        ("writers stalled by a cut, p50 / longest",
         "never: nothing is frozen" if figures.get("cut") == "capture" and figures["freeze_max_ms"] is None
         else f"{ms('freeze_p50_ms')} / {ms('freeze_max_ms')}"),
        ("lag of the standby p50 / p99 / longest", f"{ms('lag_p50_ms')} / {ms('lag_p99_ms')} / {ms('lag_max_ms')}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def keep_logs(lab):
    """What the hosts wrote, kept for whoever asks why it failed."""
    target = os.path.join(REPO, "target", "demo-logs")
    shutil.rmtree(target, ignore_errors=True)
    for host in HOSTS:
        source = lab.path(host, "log")
        if os.path.isdir(source):
            shutil.copytree(source, os.path.join(target, host))
    return target


def play(lab, step, seconds):
    """Steps 3 to 6: gives (figures, the failover's steps, complaints)."""
    say("alpha and beta are up, each with its own dockerd. The service:")
    tarball = step("PostgreSQL image from Debian packages (no registry is asked)", service.build_image, lab)
    step("image imported on alpha", service.import_image, lab, "alpha", tarball)
    step("agents started", lambda: [lab.agent(host) for host in HOSTS])
    step("agents paired", pair, lab)
    step("volume pgdata, 2 GiB", lambda: ask(lab, "alpha", "volume", "create", service.VOLUME, "--size", "2G"))
    step("PostgreSQL in a container on it", service.run_container, lab, "alpha")
    step("PostgreSQL answers", service.await_answer, lab, "alpha", 60)
    step(f"group {GROUP} protected", lambda: ask(lab, "alpha", "protect", GROUP, "--container", service.CONTAINER, "--peer", "beta"))
    writer = service.Writer(lab, "alpha")
    step("first rows acknowledged", writer.await_rows, 1)
    step("volume and image on the standby", await_sync, lab)

    say(f"Replication under load for {seconds} s:")
    watch = Watch(lab)
    watch.start()
    live(writer, watch, seconds)

    # Only an answer that came before the cut counts as a promise.
    watch.done.set()
    last, promises = watch.last, list(watch.promises)
    cut_at = lab.cut("alpha")
    watch.join(60)
    account, acknowledged = writer.stop()
    if last is None or last[2] is None:
        raise LabError("alpha reported nothing as recoverable before the cut")
    say(f"POWER CUT on alpha at {datetime.datetime.fromtimestamp(cut_at).strftime('%H:%M:%S.%f')[:-3]}: cable out, every process of it "
        f"killed, mounts and loop devices gone. The client holds {account['acknowledged']} acknowledged rows.")
    standby = status_of(lab, "beta")
    standby_until = instant(standby.get("recoverable_to"))

    say("Failover on beta:")
    figures, value = step(f"doublure failover {GROUP}, until PostgreSQL answers", failover, lab)
    held = service.found(lab, "beta", account["sent"])
    safe_until = max(until for until in (last[2], standby_until) if until is not None)
    verdict = service.compare(acknowledged, account["sent"], held, cut_at, safe_until)
    complaint = step("pg_amcheck", service.amcheck, lab, "beta")
    try:
        written = status_of(lab, "beta")
    except LabError:
        written = standby
    result = {
        **verdict, **figures, "amcheck_clean": complaint == "",
        "rpo_reported_ms": round((cut_at - last[2]) * 1000, 1),
        "rpo_reported_max_ms": round(max(promises + [cut_at - last[2]]) * 1000, 1),
        "rpo_standby_ms": None if standby_until is None else round((cut_at - standby_until) * 1000, 1),
        "rows_per_second": round(len(acknowledged) / max(acknowledged[-1][1] - acknowledged[0][1], 0.001), 1),
        "seconds_under_load": seconds,
        **counters(last[1], "bytes_changed", "bytes_read", "bytes_sent", "cycle_p50_ms", "cycle_p99_ms", "freeze_p50_ms",
                   "freeze_max_ms", "lag_p50_ms", "lag_p99_ms", "lag_max_ms", "bytes_captured", "holes", "cycles", "generations"),
        "cut": " and ".join(sorted({volume.get("cut") or "unknown" for volume in last[1].get("volumes", [])})),
        "cut_reason": next((volume["cut_reason"] for volume in last[1].get("volumes", []) if volume.get("cut_reason")), None),
    }
    result["bytes_written"] = counters(written, "bytes_written")["bytes_written"] or counters(standby, "bytes_written")["bytes_written"]
    complaints = []
    if not verdict["rows_gapless"]:
        complaints.append(f"the rows are no gapless prefix of what was acknowledged ({held['count']} rows, highest {held['highest']}, "
                          f"{held['damaged']} damaged)")
    if verdict["rows_reported_safe_but_lost"]:
        complaints.append(f"{verdict['rows_reported_safe_but_lost']} rows were reported as recoverable and are lost")
    if complaint:
        complaints.append(f"pg_amcheck: {complaint.splitlines()[0]}")
    if verdict["rows_present"] == 0:
        complaints.append("no row at all is on the standby")
    return result, steps_of(value), complaints


def main():
    parser = argparse.ArgumentParser(prog="./dev demo", description="The whole journey on this machine: two hosts, a database, a power cut, a failover.")
    parser.add_argument("--seconds", type=int, default=30, metavar="N", help="how long to write under replication before the cut (default 30)")
    arguments = parser.parse_args()
    if not 3 <= arguments.seconds <= 86400:
        parser.error("--seconds is between 3 and 86400")
    adopt_orphans()
    step = Steps()
    try:
        os.unlink(os.path.join(REPO, "target", "demo.json"))  # a failed run must not leave the figures of an earlier one
    except FileNotFoundError:
        pass
    with whole_lab() as lab:
        lab.binary()
        try:
            figures, steps, complaints = play(lab, step, arguments.seconds)
        except (LabError, OSError, ValueError, subprocess.SubprocessError) as error:
            say(f"The demo failed: {error}")
            for host in HOSTS:
                say(f"  {host}'s agent says last: {lab.last_words(host, 'agent')}")
            say(f"The logs of both hosts are kept in {keep_logs(lab)}.")
            return 1
        figures["demo_seconds"] = round(time.monotonic() - step.began, 1)
        if complaints:
            keep_logs(lab)
    file = report.write(REPO, "target/demo.json", {"passed": not complaints, **figures})
    say("Measured:")
    say(table(figures, steps))
    say(f"  all of it on {report.machine()}")
    say(f"  the same figures: {os.path.relpath(file, REPO)}. Both hosts are removed; the database image stays cached in "
        f"{lab.path('cache')} (./dev lab down --all removes it too).")
    for complaint in complaints:
        say(f"FAILED: {complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    atexit.register(report.give_back, REPO)
    try:
        sys.exit(main())
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"\ndemo: stopped by {str(error) or 'Ctrl-C'}; everything it made is removed", file=sys.stderr)
        sys.exit(130)
