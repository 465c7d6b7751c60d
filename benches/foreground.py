#!/usr/bin/env python3
"""What the application feels: fio on ext4 in a volume, while the volume is left alone, tracked, captured, or replicated.

`foreground.py [--quick]`: shorter rounds, for a try.

Ways: untracked | bitmap (tracked, not cut) | consumer (captured and thrown away, see benches/drain.rs) | interval (a cut a second, from
captured writes) | continuous (the default) | freeze (a cut a second, file system frozen); both agents, journal and replica are on
the same processors and disk. And, apart from all agents, a reflink clone of the image once a second. The ways alternate; figures are medians of the
rounds, and ratios are to the untracked job beside it.
"""
import json
import os
import subprocess
import sys
import time

import rig

QUICK = "--quick" in sys.argv
ROUNDS = 2 if QUICK else 4
SECONDS = 4 if QUICK else 10
# After a restart and a sync the disk still has the standby's writes in its queue; they belong to neither side of a comparison.
SETTLE_SECONDS = 2 if QUICK else 4
SETTINGS = {
    "bitmap": 'mode = "interval"\ninterval = "1h"\n',
    "interval": 'mode = "interval"\ninterval = "1s"\n',
    "continuous": "",
    "freeze": 'mode = "freeze"\ninterval = "1s"\n',
}
JOBS = {
    "rand16": ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--direct=1"],
    "rand1sync": ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--direct=1", "--fsync=1"],
    "buffered": ["--rw=randwrite", "--bs=64k", "--direct=0", "--ioengine=psync", "--fsync_on_close=1"],
    "seq1m": ["--rw=write", "--bs=1M", "--iodepth=4", "--direct=1"],
}
# Every way is measured on the first job; these on all.
ALL_JOBS = ("untracked", "bitmap", "interval", "continuous")


def fio(lab, mount, job, seconds=SECONDS):
    options = [f"--size={1 << 30}", "--time_based", f"--runtime={seconds}", *JOBS[job]]
    write = rig.fio(lab, f"{mount}/file", *options)["write"]
    spread = write["clat_ns"].get("percentile", {})
    return {"iops": write["iops"], "p9999_ms": spread.get("99.990000", 0) / 1e6}


def drain_binary():
    done = subprocess.run(["cargo", "build", "--release", "--bench", "drain", "--message-format=json"], cwd=rig.REPO,
                          capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message.get("target", {}).get("name") == "drain":
            return message["executable"]
    raise rig.LabError("cargo named no drain binary")


def consumed(lab, drain, device, image, work, seconds):
    """Runs `work` while the ring's consumer alone captures the device; gives both results."""
    child = subprocess.Popen([drain, device, image, str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        first = child.stdout.readline()
        if first.strip() != "ready":
            raise rig.LabError(f"the drain said {first!r}")
        result = work()
        said = child.stdout.read()
        child.wait(seconds + 30)
        return result, json.loads(said.strip().splitlines()[-1])
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def burst(lab, mount):
    """A buffered writer fills the page cache with 256 MiB, then syncs: how old the standby's copy becomes."""
    began = time.monotonic()
    lab.exec("alpha", ["dd", "if=/dev/urandom", f"of={mount}/burst", "bs=1M", "count=256", "conv=fsync", "status=none"], timeout=120)
    wrote = time.monotonic() - began
    time.sleep(3)
    return wrote, rig.group(lab)["counters"]["lag_max_ms"]


def clones(lab):
    """The same job while the image is cloned once a second, on XFS: what a user without a tracker would do."""
    base = lab.path("clones")
    os.makedirs(base, exist_ok=True)
    image, device, inner = f"{base}/xfs.img", None, None
    try:
        with open(image, "wb") as file:
            file.truncate(6 << 30)
        subprocess.run(["mkfs.xfs", "-q", "-f", image], check=True)
        os.makedirs(f"{base}/xfs", exist_ok=True)
        subprocess.run(["mount", "-o", "loop", image, f"{base}/xfs"], check=True)
        device = True
        with open(f"{base}/xfs/volume", "wb") as file:
            file.truncate(2 << 30)
        inner = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", f"{base}/xfs/volume"], check=True, capture_output=True,
                               text=True).stdout.strip()
        subprocess.run(["mkfs.ext4", "-q", "-F", inner], check=True)
        os.makedirs(f"{base}/fs", exist_ok=True)
        subprocess.run(["mount", inner, f"{base}/fs"], check=True)

        def job(seconds):
            done = subprocess.run(["fio", "--output-format=json", "--name=job", f"--filename={base}/fs/file", "--ioengine=io_uring",
                                   "--size=1G", "--time_based", f"--runtime={seconds}", *JOBS["rand16"]], check=True, capture_output=True,
                                  text=True, timeout=300)
            return json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]["write"]
        subprocess.run(["fio", "--name=fill", f"--filename={base}/fs/file", "--rw=write", "--bs=1M", "--size=1G", "--direct=1"], check=True,
                       capture_output=True)
        alone = job(SECONDS)
        loop = subprocess.Popen(["bash", "-c", f"i=0; while sleep 1; do i=$((i+1)); cp --reflink=always {base}/xfs/volume {base}/xfs/c$((i%4)); done"])
        try:
            beside = job(SECONDS)
        finally:
            loop.kill()
            loop.wait()
        spread = beside["clat_ns"]["percentile"]["99.990000"] / 1e6
        return beside["iops"] / alone["iops"], spread
    finally:
        subprocess.run(["umount", f"{base}/fs"], check=False, capture_output=True)
        if inner:
            subprocess.run(["losetup", "--detach", inner], check=False)
        if device:
            subprocess.run(["umount", f"{base}/xfs"], check=False)


def work():
    runs = {}  # (way, job) -> list of results
    drains, lags, stalls = [], [], []
    drain = drain_binary()
    with rig.pair(SETTINGS["bitmap"]) as lab:
        mounts, places = {}, {}
        for name in ("plain", "kept"):
            places[name] = rig.volume(lab, name, "2G")
            mounts[name] = f"/mnt/{name}"
            lab.exec("alpha", ["mkdir", "-p", mounts[name]])
            lab.exec("alpha", ["mount", f"/run/doublure/dev/{name}", mounts[name]])
            rig.fio(lab, f"{mounts[name]}/file", "--rw=write", "--bs=1M", "--iodepth=8", "--size=1G", "--direct=1", "--end_fsync=1")
        rig.verb(lab, "alpha", "protect", rig.GROUP, "--volume", "kept", "--peer", "beta")
        rig.synced(lab)
        bursts = []
        for number in range(ROUNDS):
            for job in JOBS:
                if job != "rand16" and number % 2:
                    continue
                ways = ("untracked", "consumer", *SETTINGS) if job == "rand16" else ALL_JOBS
                for way in ways:
                    if way in SETTINGS:
                        rig.restart(lab, "alpha", SETTINGS[way])
                        rig.synced(lab)
                    time.sleep(SETTLE_SECONDS)
                    if way == "consumer":
                        _, device, image = places["plain"]
                        one, said = consumed(lab, drain, device, image, lambda: fio(lab, mounts["plain"], job), SECONDS + 2)
                        drains.append(said)
                    else:
                        one = fio(lab, mounts["plain" if way == "untracked" else "kept"], job)
                    runs.setdefault((way, job), []).append(one)
                    if way == "continuous":
                        counters = rig.group(lab)["counters"]
                        # Within a burst that outlasts the job no generation may end: then the lag is at least the job's length.
                        if job in ("rand16", "buffered"):
                            lags.append(counters["lag_p99_ms"] if counters["lag_p99_ms"] is not None else SECONDS * 1000.0)
                        one["holes"], one["rounds"] = counters["holes"], counters["rounds"]
                        if job == "buffered":
                            bursts.append(burst(lab, mounts["kept"])[1] or SECONDS * 1000.0)
                    if way == "freeze":
                        stalls.append(rig.group(lab)["counters"]["freeze_max_ms"])
                    rig.say(f"    round {number + 1} {job:<10} {way:<11} {one['iops']:9.0f} IOPS, p99.99 {one['p9999_ms']:8.2f} ms"
                            + (f", lag p99 {counters['lag_p99_ms']} ms, {one['holes']} holes" if way == "continuous" else ""))
        # The consumer alone against sequential writes.
        _, device, image = places["plain"]
        seq, said = consumed(lab, drain, device, image, lambda: fio(lab, mounts["plain"], "seq1m", SECONDS), SECONDS + 2)
        for mount in mounts.values():
            lab.exec("alpha", ["umount", mount])
        clone_ratio, clone_ms = clones(lab)

    def ratio(way, job):
        return rig.median([one["iops"] / base["iops"] for one, base in zip(runs[(way, job)], runs[("untracked", job)])])

    def added(way, job):
        return rig.median([one["p9999_ms"] - base["p9999_ms"] for one, base in zip(runs[(way, job)], runs[("untracked", job)])])

    figures = {f"iops_{way}": rig.median([one["iops"] for one in runs[(way, "rand16")]]) for way in ("untracked", "consumer", *SETTINGS)}
    figures |= {f"ratio_{way}": ratio(way, "rand16") for way in ("bitmap", "consumer", "interval", "continuous", "freeze")}
    figures |= {f"ratio_{way}_{job}": ratio(way, job) for job in JOBS if job != "rand16" for way in ("bitmap", "interval", "continuous")}
    figures |= {
        "ratio_clone": clone_ratio, "p9999_clone_ms": clone_ms,
        "added_p9999_ms": added("continuous", "rand16"), "added_p9999_interval_ms": added("interval", "rand16"),
        "added_p9999_freeze_ms": added("freeze", "rand16"), "added_p9999_buffered_ms": added("continuous", "buffered"),
        "added_p9999_seq1m_ms": added("continuous", "seq1m"),
        "rpo_p99_ms": rig.median(lags), "rpo_burst_ms": rig.median(bursts), "freeze_max_ms": rig.median(stalls),
        "consumer_mib_per_processor_second": rig.median([d["captured_bytes"] / d["processor_seconds"] for d in drains + [said]]) / (1 << 20),
        "consumer_holes_of_seq1m": said["holes"], "consumer_seq1m_mib_s": seq["iops"],
    }
    rig.finish("foreground", figures)


sys.exit(rig.main(work))
