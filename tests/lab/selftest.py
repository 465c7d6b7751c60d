#!/usr/bin/env python3
"""Tests of the lab itself, as root: is a power cut here what the demo takes it for, and would the demo see a loss?

No agent takes part. What the demo measures is only as good as this: hosts that see nothing of each other, a client that
outlives the cut, a comparison that notices, and a machine that is afterwards as it was.
"""
import json
import os
import subprocess
import sys
import time
import traceback

import service
from lab import HOSTS, Lab, LabError, adopt_orphans, wait_for, whole_lab


def machine():
    """What the lab could leave behind on this machine: its loop devices, mounts, links, control groups and processes. Others may
    work here at the same time; what is plainly theirs is left out."""
    lab = Lab()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        rows = [(line.split()[4], line) for line in file]
    mounts = sorted(point for point, line in rows if point.startswith((lab.dir, "/run", "/sys", "/proc")) or lab.dir in line)
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split(":")[1].split("@")[0].strip() for line in links} & {*HOSTS, "br0", "docker0", "eth0"}
    groups = [point for point, _ in rows for host in HOSTS if os.path.isdir(os.path.join(point, lab.cgroup(host)))]
    return {"mounts": mounts, "links": sorted(names), "loops of the lab": lab.loops(), "control groups": groups,
            "processes of the lab": processes_in_lab(lab)}


def processes_in_lab(lab):
    """Processes that have the lab's directory open, mounted or on their command line, this one and its parents aside."""
    skip, pid = set(), os.getpid()
    while pid > 1:
        skip.add(pid)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            pid = int(file.read().rsplit(")", 1)[1].split()[1])
    seen = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in skip:
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                if lab.dir.encode() in file.read():
                    seen.append(int(entry))
        except OSError:
            pass
    return seen


def hosts_are_apart(lab):
    for host in HOSTS:
        assert lab.exec(host, ["hostname"]).stdout.strip() == host
        links = lab.exec(host, ["ls", "/sys/class/net"]).stdout.split()
        assert sorted(links) == ["docker0", "eth0", "lo"], f"{host} sees {links}"
        other = "beta" if host == "alpha" else "alpha"
        lab.exec(host, ["bash", "-c", f"exec 3<>/dev/tcp/{HOSTS[other][0]}/9"], check=False)
        assert lab.exec(host, ["ip", "neighbour", "show", HOSTS[other][0]]).stdout.count("lladdr") == 1, "the wire carries nothing"
        pins = [name for name in lab.exec(host, ["ls", "/sys/fs/bpf"]).stdout.split() if not name.endswith(".debug")]
        assert pins == [], f"a bpffs that is not the host's own: {pins}"
        assert lab.exec(host, ["docker", "info", "--format", "{{.DockerRootDir}}"]).stdout.strip() == lab.path(host, "docker")
    # A file in one host's /run is not in the other's.
    lab.exec("alpha", ["touch", "/run/only-alpha"])
    assert lab.exec("beta", ["test", "-e", "/run/only-alpha"], check=False).returncode == 1


def a_cable_can_be_pulled(lab):
    listen = ["/usr/bin/python3", "-c", "import socket; s = socket.create_server(('10.77.0.2', 7)); print('up', flush=True)\n"
              "while True: s.accept()[0].close()"]
    lab.spawn("beta", listen, lab.path("beta", "log", "listen.log"))
    wait_for("a listener on beta", 10, lambda: "up" in lab.last_words("beta", "listen"))

    def reach():
        probe = "import socket; socket.create_connection(('10.77.0.2', 7), 1)"
        return lab.exec("alpha", ["/usr/bin/python3", "-c", probe], check=False).returncode == 0

    assert reach()
    lab.cable("beta", False)
    assert not reach(), "beta answers without a cable"
    lab.cable("beta", True)
    wait_for("beta's answer with the cable back", 10, reach)


def power_cut_and_comparison(lab):
    """PostgreSQL on a loop volume of alpha, cut under load; beta gets the volume's bytes by hand: nothing acknowledged may
    miss, since the machine's page cache survives. Then rows are taken away, and the comparison must say so."""
    tarball = service.build_image(lab)
    for host in HOSTS:
        service.import_image(lab, host, tarball)

    def volume(host):
        image = lab.path(host, "state", "volume.img")
        device = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", image], check=True, capture_output=True, text=True)
        lab.exec(host, ["docker", "volume", "create", "--driver", "local", "--opt", "type=ext4", "--opt",
                        f"device={device.stdout.strip()}", service.VOLUME])
        return image

    first = lab.path("alpha", "state", "volume.img")
    with open(first, "wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.ext4", "-q", first], check=True)
    volume("alpha")
    service.run_container(lab, "alpha")
    service.await_answer(lab, "alpha", 60)
    assert lab.loops("alpha") and not lab.loops("beta")
    writer = service.Writer(lab, "alpha")
    writer.await_rows(500)
    inside = int(lab.exec("alpha", ["docker", "inspect", "--format", "{{.State.Pid}}", service.CONTAINER]).stdout)
    assert lab.alive("alpha", inside)
    cut_at = lab.cut("alpha")
    assert lab.pid("alpha") is None and not lab.loops("alpha"), "alpha is not dead"
    account, acknowledged = writer.stop()
    assert account["end"] != "asked to" or account["sent"] >= account["acknowledged"]

    second = lab.path("beta", "state", "volume.img")
    subprocess.run(["cp", "--sparse=always", first, second], check=True)
    volume("beta")
    service.run_container(lab, "beta")
    service.await_answer(lab, "beta", 60)
    held = service.found(lab, "beta", account["sent"])
    verdict = service.compare(acknowledged, account["sent"], held, cut_at, time.time())
    assert verdict["rows_acknowledged"] >= 500 and verdict["rows_gapless"] and verdict["rows_lost"] == 0, verdict
    assert verdict["rows_reported_safe_but_lost"] == 0, verdict
    assert service.amcheck(lab, "beta") == ""

    # Would it notice? The last ten acknowledged rows gone, then a hole, then a page of another time.
    last = account["acknowledged"]
    service.query(lab, "beta", f"DELETE FROM ledger WHERE n > {last - 10}")
    # The client notes an acknowledgement when it gets to run, which may be after the cable was pulled: the last note counts.
    noted = acknowledged[-1][1]
    verdict = service.compare(acknowledged, account["sent"], service.found(lab, "beta", account["sent"]), noted, noted)
    assert verdict["rows_gapless"] and verdict["rows_lost"] == verdict["rows_reported_safe_but_lost"] == 10, verdict
    assert verdict["rpo_found_ms"] == round((noted - acknowledged[-10][1]) * 1000, 1), verdict
    verdict = service.compare(acknowledged, account["sent"], service.found(lab, "beta", account["sent"]), cut_at, None)
    assert verdict["rows_reported_safe_but_lost"] == 0, "nothing was reported, so nothing can have been broken"
    service.query(lab, "beta", "DELETE FROM ledger WHERE n = 7")
    verdict = service.compare(acknowledged, account["sent"], service.found(lab, "beta", account["sent"]), cut_at, cut_at)
    assert not verdict["rows_gapless"] and verdict["rows_lost"] == 11, verdict
    service.query(lab, "beta", "UPDATE ledger SET payload = 'old' WHERE n = 8")
    assert service.found(lab, "beta", account["sent"])["damaged"] == 1
    # An index that disagrees with its table: pg_amcheck must not call that clean.
    service.query(lab, "beta", "SET allow_system_table_mods = on; UPDATE pg_index SET indisvalid = false, indisready = false "
                               "WHERE indexrelid = 'ledger_pkey'::regclass; INSERT INTO ledger VALUES (7, 'unindexed'); "
                               "UPDATE pg_index SET indisvalid = true, indisready = true WHERE indexrelid = 'ledger_pkey'::regclass")
    assert service.amcheck(lab, "beta") != "", "pg_amcheck overlooked a row that its index lacks"


def leftovers_of_a_dead_run(lab):
    """`down` of another process, which knows only what is written down, after this one forgot everything."""
    image = lab.path("alpha", "left.img")
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["losetup", "--find", image], check=True)
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        # A pid that was reused since: recorded with another start time, it must be left alone.
        with lab.mutex:
            state = lab.state()
        lab.record("stranger", stranger.pid)
        state = lab.state()
        state["processes"]["stranger"]["start"] -= 1
        with open(lab.state_file, "w", encoding="utf-8") as file:
            json.dump(state, file)
        fresh = Lab(lab.dir)
        fresh.down()
        fresh.down()
        assert stranger.poll() is None, "a process that only shares a recorded pid was killed"
        assert not fresh.loops() and not os.path.exists(lab.path("alpha"))
    finally:
        stranger.kill()
        stranger.wait()


def main():
    adopt_orphans()
    passed = failed = 0
    before = machine()
    try:
        with whole_lab() as lab:
            for test in (hosts_are_apart, a_cable_can_be_pulled, power_cut_and_comparison, leftovers_of_a_dead_run):
                began = time.monotonic()
                try:
                    test(lab)
                    passed, word = passed + 1, "ok"
                except Exception:  # noqa: BLE001 - the next test still runs, this one is counted
                    traceback.print_exc()
                    failed, word = failed + 1, "FAILED"
                print(f"test lab::{test.__name__} ... {word} ({time.monotonic() - began:.1f} s)", flush=True)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        failed += 1
    after = machine()
    if before == after:
        passed, word = passed + 1, "ok"
    else:
        failed, word = failed + 1, "FAILED"
        for what in before:
            if before[what] != after[what]:
                print(f"{what}: before {before[what]}, after {after[what]}", file=sys.stderr)
    print(f"test lab::the_machine_is_as_it_was ... {word}")
    print(f"test result: {'ok' if not failed else 'FAILED'}. {passed} passed; {failed} failed; 0 ignored")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
