#!/usr/bin/env python3
"""A cycle over 80 MiB changed in random 4 KiB blocks: of a full 8 GiB volume, and of a sparse 1 TiB one.

Time is that of the whole command `doublure sync GROUP --wait`, from its start to the standby's commit. Bytes read are compared
with bytes changed. `cycle.py [--quick]`: 1 GiB in place of 8, for a try.
"""
import sys

import rig

CHANGED = 80 << 20
ROUNDS = 5


def rounds(lab, device, rounds_of):
    """Seconds and ratios of several cycles."""
    seconds, ratios, sent = [], [], []
    for number in range(ROUNDS):
        rig.fio(lab, device, "--direct=1", "--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={CHANGED}", f"--size={rounds_of}",
                "--buffer_compress_percentage=50", "--refill_buffers", f"--randseed={1000 + number}")
        before = rig.group(lab)["counters"]
        _, took = rig.verb(lab, "alpha", "sync", rig.GROUP, "--wait")
        after = rig.group(lab)["counters"]
        changed = after["bytes_changed"] - before["bytes_changed"]
        if changed < CHANGED * 0.9:
            raise rig.LabError(f"only {changed} bytes were seen as changed of {CHANGED}")
        seconds.append(took)
        ratios.append((after["bytes_read"] - before["bytes_read"]) / changed)
        sent.append(after["bytes_sent"] - before["bytes_sent"])
        rig.say(f"    round {number + 1}: {took:.3f} s, read/changed {ratios[-1]:.3f}, sent {sent[-1] >> 20} MiB")
    return rig.median(seconds), rig.median(ratios), rig.median(sent)


def work():
    full = (1 if "--quick" in sys.argv else 8) << 30
    figures = {}
    with rig.pair('mode = "interval"\ninterval = "1h"\n') as lab:
        for name, size in (("full", full), ("sparse", 1 << 40)):
            rig.say(f"  {name}: {size >> 30} GiB")
            _, device, _ = rig.volume(lab, name, str(size))
            if name == "full":
                rig.fio(lab, device, "--direct=1", "--rw=write", "--bs=1M", "--iodepth=8", f"--size={size}", "--buffer_compress_percentage=50", "--refill_buffers")
            rig.GROUP = name
            rig.verb(lab, "alpha", "protect", name, "--volume", name, "--peer", "beta")
            rig.synced(lab)
            seconds, ratio, sent = rounds(lab, device, size)
            suffix = "" if name == "full" else "_sparse_1tib"
            figures[f"seconds_to_commit{suffix}"] = seconds
            figures[f"bytes_read_ratio{suffix}"] = ratio
            figures[f"bytes_sent{suffix}"] = int(sent)
        for host in ("alpha", "beta"):
            for key, value in rig.resident_bytes(lab, host).items():
                figures[f"{host}_{key.lower()}_bytes"] = value
    figures["bytes_changed"] = CHANGED
    figures["volume_bytes"] = full
    figures["ratio_sparse_1tib"] = figures["seconds_to_commit_sparse_1tib"] / figures["seconds_to_commit"]
    rig.finish("cycle", figures)


sys.exit(rig.main(work))
