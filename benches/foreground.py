#!/usr/bin/env python3
"""What the application feels: fio, 4 KiB random direct writes at depth 16 on ext4, for a volume that is not tracked, one whose
bitmap is kept but that is not cut, and one that is cut once a second. The three alternate; figures are medians of the rounds.

`foreground.py [--quick]`: shorter rounds, for a try.
"""
import sys
import time

import rig

ROUNDS = 4
# After a restart and a sync the disk still has the standby's writes in its queue; they belong to neither side of a comparison.
SETTLE_SECONDS = 4
IDLE, CYCLING = 'interval = "1h"\n', 'interval = "1s"\n'


def job(lab, mount, seconds):
    time.sleep(SETTLE_SECONDS)
    done = rig.fio(lab, f"{mount}/file", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=1G", "--time_based", f"--runtime={seconds}")
    write = done["write"]
    return write["iops"], write["clat_ns"]["percentile"]["99.990000"] / 1e6


def work():
    seconds = 5 if "--quick" in sys.argv else 15
    runs = {"untracked": [], "bitmap": [], "interval": []}
    with rig.pair(IDLE) as lab:
        mounts = {}
        for name in ("plain", "kept"):
            rig.volume(lab, name, "2G")
            mounts[name] = f"/mnt/{name}"
            lab.exec("alpha", ["mkdir", "-p", mounts[name]])
            lab.exec("alpha", ["mount", f"/run/doublure/dev/{name}", mounts[name]])
            rig.fio(lab, f"{mounts[name]}/file", "--rw=write", "--bs=1M", "--iodepth=8", "--size=1G", "--end_fsync=1")
        rig.verb(lab, "alpha", "protect", rig.GROUP, "--volume", "kept", "--peer", "beta")
        rig.synced(lab)
        frozen = None
        for number in range(ROUNDS):
            runs["untracked"].append(job(lab, mounts["plain"], seconds))
            rig.restart(lab, "alpha", IDLE)
            rig.synced(lab)
            runs["bitmap"].append(job(lab, mounts["kept"], seconds))
            rig.restart(lab, "alpha", CYCLING)
            rig.synced(lab)
            runs["interval"].append(job(lab, mounts["kept"], seconds))
            frozen = rig.group(lab)["counters"]
            for kind, values in runs.items():
                rig.say(f"    round {number + 1}: {kind:<10} {values[-1][0]:9.0f} IOPS, p99.99 {values[-1][1]:8.1f} ms")
        for mount in mounts.values():
            lab.exec("alpha", ["umount", mount])
    iops = {kind: rig.median([v[0] for v in values]) for kind, values in runs.items()}
    worst = {kind: rig.median([v[1] for v in values]) for kind, values in runs.items()}
    rig.finish("foreground", {
        "iops_untracked": iops["untracked"], "iops_bitmap": iops["bitmap"], "iops_interval": iops["interval"],
        "ratio_bitmap": rig.median([b[0] / a[0] for a, b in zip(runs["untracked"], runs["bitmap"])]),
        "ratio_interval": rig.median([b[0] / a[0] for a, b in zip(runs["untracked"], runs["interval"])]),
        "p9999_untracked_ms": worst["untracked"], "p9999_bitmap_ms": worst["bitmap"], "p9999_interval_ms": worst["interval"],
        "added_p9999_ms": worst["interval"] - worst["untracked"],
        "freeze_p50_ms": frozen["freeze_p50_ms"], "freeze_max_ms": frozen["freeze_max_ms"], "cuts_discarded": frozen["cuts_discarded"],
    })


sys.exit(rig.main(work))
