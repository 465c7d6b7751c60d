#!/usr/bin/env python3
"""First sync of 4 GiB, TLS, crc and digests on, against a plain direct `dd` of the same bytes on the same disk, in turn.

`firstsync.py [--quick]`: 1 GiB, for a try.
"""
import os
import sys
import time

import rig

ROUNDS = 3


def work():
    size = (1 if "--quick" in sys.argv else 4) << 30
    syncs, copies = [], []
    with rig.pair('mode = "interval"\ninterval = "1h"\n') as lab:
        for number in range(ROUNDS):
            name = f"v{number}"
            _, device, image = rig.volume(lab, name, str(size))
            rig.fio(lab, device, "--direct=1", "--rw=write", "--bs=1M", "--iodepth=8", f"--size={size}", "--buffer_compress_percentage=50", "--refill_buffers")
            copy = os.path.join(os.path.dirname(image), "copy.img")
            began = time.monotonic()
            lab.exec("alpha", ["dd", f"if={image}", f"of={copy}", "bs=1M", "iflag=direct", "oflag=direct", "conv=fsync", "status=none"], timeout=600)
            copies.append(time.monotonic() - began)
            lab.exec("alpha", ["rm", copy])
            rig.GROUP = name
            began = time.monotonic()
            rig.verb(lab, "alpha", "protect", name, "--volume", name, "--peer", "beta")
            rig.synced(lab)
            syncs.append(time.monotonic() - began)
            rig.say(f"    round {number + 1}: first sync {syncs[-1]:.2f} s, dd {copies[-1]:.2f} s")
        resident = rig.resident_bytes(lab, "alpha")
    rig.finish("firstsync", {
        "bytes": size, "seconds_first_sync": rig.median(syncs), "seconds_dd": rig.median(copies),
        "ratio_dd": rig.median([d / s for d, s in zip(copies, syncs)]),
        "mib_per_second_first_sync": size / rig.median(syncs) / (1 << 20), "alpha_rssanon_bytes": resident["RssAnon"],
    })


sys.exit(rig.main(work))
