#!/usr/bin/env python3
"""Stories on two real hosts: what happens to the replica when things go wrong, told one by one.

    stories.py [--long] [--loud] [STORY...]     without a name, all of them; --loud: what the agents warned of, too

Every story ends the same way: writers are stopped, one last cut is taken, and the standby's replica is compared with the primary's
device byte for byte. The group has two volumes, ext4 and XFS, mounted and written on alpha while everything else goes on.
Randomness comes from one seed, printed first (DOUBLURE_SEED sets it), so that a failing run can be told again.
"""
import contextlib
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

from lab import AGENT_PORT, HOSTS, LabError, adopt_orphans, wait_for, whole_lab

GROUP = "tale"
VOLUMES = {"vol-ext4": ("ext4", 256 << 20), "vol-xfs": ("xfs", 320 << 20)}
# Small rings and short checkpoints: holes, rounds and checks come in every story.
FAST = 'interval = "100ms"\ncheckpoint_interval = "2s"\ncapture_ring = "8 MiB"\ncut_max = "8 MiB"\njournal = "64 MiB"\n'
FREEZE = 'mode = "freeze"\ninterval = "200ms"\ncut_max = "8 MiB"\njournal = "64 MiB"\n'


def say(text):
    print(text, flush=True)


class Tale:
    """The two hosts with their agents, one group, and the writers."""

    def __init__(self, lab, seed):
        self.lab, self.random = lab, random.Random(seed)
        self.agents, self.writers = {}, []

    def verb(self, host, *argv, good=(0,), timeout=240, stdin=None):
        done = self.lab.doublure(host, list(argv) + ["--json"], check=False, timeout=timeout, stdin=stdin)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if done.returncode not in good or not lines:
            raise LabError(f"doublure {' '.join(argv)} on {host} ended with {done.returncode}: {(lines or [done.stderr])[-1]}")
        return json.loads(lines[-1])

    def group(self, host="alpha"):
        for row in self.verb(host, "status", good=(0, 4))["groups"]:
            if row["name"] == GROUP:
                return row
        raise LabError(f"{host} does not know group {GROUP}")

    def start(self, host, extra=FAST, within=()):
        self.agents[host] = self.lab.agent(host, extra, within)

    def restart(self, host, extra=FAST, within=()):
        self.kill_agent(host)
        self.start(host, extra, within)

    def signal_agent(self, host, name):
        self.lab.exec(host, ["kill", f"-{name}", str(self.agents[host])])

    def log(self, host):
        """Where the host's log ends now: give it to `said` for what came after."""
        return os.path.getsize(self.lab.path(host, "log", "agent.log"))

    def said(self, host, since=0):
        with open(self.lab.path(host, "log", "agent.log"), encoding="utf-8", errors="replace") as file:
            file.seek(since)
            return [re.sub("\x1b[^m]*m", "", line.rstrip("\n")) for line in file]

    def kill_agent(self, host):
        self.lab.exec(host, ["kill", "-KILL", str(self.agents[host])])
        wait_for(f"the end of {host}'s agent", 20, lambda: not self.lab.alive(host, self.agents[host]), 0.05)

    def set_up(self):
        for host in HOSTS:
            self.start(host)
        code = self.verb("beta", "pair")["code"]
        self.verb("alpha", "pair", f"{HOSTS['beta'][0]}:{AGENT_PORT}", stdin=code + "\n")
        for name, (fs, size) in VOLUMES.items():
            self.verb("alpha", "volume", "create", name, "--size", str(size), "--fs", fs)
        self.mount()
        self.verb("alpha", "protect", GROUP, "--volume", "vol-ext4", "--volume", "vol-xfs", "--peer", "beta")
        wait_for("the first sync", 120, lambda: self.group()["in_sync"], 0.1)

    def mount(self):
        for name in VOLUMES:
            self.lab.exec("alpha", ["mkdir", "-p", f"/mnt/{name}"])
            self.lab.exec("alpha", ["mount", f"/run/doublure/dev/{name}", f"/mnt/{name}"])

    def tidy(self):
        """Removes the files of earlier stories: the volumes are small."""
        for name in VOLUMES:
            self.lab.exec("alpha", ["find", f"/mnt/{name}", "-mindepth", "1", "-not", "-name", "lost+found", "-delete"])

    def unmount(self):
        for name in VOLUMES:
            # A frozen file system cannot be unmounted, and a freeze is short: once more is enough.
            def gone(name=name):
                return self.lab.exec("alpha", ["umount", f"/mnt/{name}"], check=False).returncode == 0
            wait_for(f"umount of {name}", 20, gone, 0.1)

    # ---- writers ------------------------------------------------------------------------------------------------------

    SCRIPTS = {
        # Random 4 KiB writes, some of them direct, over a file that grows and shrinks.
        "random": "while :; do dd if=/dev/urandom of=$1/r bs=4k count=$((RANDOM % 200 + 1)) seek=$((RANDOM % 8000)) conv=notrunc,fdatasync status=none; "
                  "dd if=/dev/zero of=$1/r bs=4k count=8 seek=$((RANDOM % 8000)) oflag=direct conv=notrunc status=none; done",
        # Small files made, renamed and removed, then the freed space discarded.
        "files": "i=0; while :; do i=$((i+1)); d=$1/d$((i % 7)); mkdir -p $d; for f in 1 2 3 4 5 6 7 8; do head -c $((RANDOM * 4)) /dev/urandom > $d/n$f; mv $d/n$f $d/f$f; done; "
                 "sync $d/f1; [ $((i % 5)) = 0 ] && rm -rf $1/d$((RANDOM % 7)); [ $((i % 9)) = 0 ] && fstrim $1; done",
        # A large burst through the page cache.
        "burst": "while :; do dd if=/dev/urandom of=$1/b bs=1M count=$((RANDOM % 24 + 1)) conv=notrunc status=none; sleep 0.$((RANDOM % 9)); sync -f $1; done",
    }

    def write(self, *kinds):
        for kind in kinds:
            for name in VOLUMES:
                argv = self.lab.enter("alpha") + ["bash", "-c", self.SCRIPTS[kind], "bash", f"/mnt/{name}"]
                self.writers.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))

    def rest(self):
        """Stops every writer, and waits until each is gone: a write that comes later would spoil the comparison."""
        for writer in self.writers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(writer.pid, signal.SIGKILL)
        for writer in self.writers:
            writer.wait(60)
        self.writers = []

    def complaints(self, since):
        """What the agents warned of, each kind once with how often; numbers do not make kinds."""
        kinds = {}
        for host in HOSTS:
            for line in self.said(host, since[host]):
                if " WARN " in line or " ERROR " in line:
                    kind = (host, re.sub(r"[0-9a-f]{8,}|\d+", "#", line.split(" ", 1)[1].strip()))
                    kinds[kind] = kinds.get(kind, 0) + 1
        return [f"{host} {times}x {text[:230]}" for (host, text), times in kinds.items()]

    def script(self, text, *argv, out=subprocess.DEVNULL):
        """A writer of its own, in Python."""
        argv = self.lab.enter("alpha") + ["/usr/bin/python3", "-u", "-c", text, *map(str, argv)]
        self.writers.append(subprocess.Popen(argv, stdout=out, start_new_session=True, text=True))
        return self.writers[-1]

    # ---- the end of every story ----------------------------------------------------------------------------------------

    def paths(self, host):
        rows = self.verb(host, "volume", "list")["volumes"]
        return {row["name"]: row["image"] for row in rows}

    def equal(self, remount=True):
        """Writers stopped, one last cut, every byte compared."""
        self.rest()
        self.unmount()

        def synced():
            with contextlib.suppress(LabError):
                return self.verb("alpha", "sync", GROUP, "--wait", timeout=120)
            return None
        wait_for("the last cut", 180, synced, 0.5)
        # The acknowledgement comes before the apply: what is compared is the applied replica.
        tip = self.group()["generation"]

        def applied():
            row = self.group("beta")
            return row["applied_generation"] == tip and row["state"] == "standby"
        wait_for("the last apply", 60, applied, 0.1)
        mine, theirs = self.paths("alpha"), self.paths("beta")
        for name, (_, size) in VOLUMES.items():
            done = subprocess.run(["cmp", "-n", str(size), mine[name], theirs[name]], capture_output=True, text=True)
            if done.returncode != 0:
                raise LabError(f"{name}: the replica differs at generation {tip}: {(done.stdout + done.stderr).strip()}")
        if remount:
            self.mount()
        return tip


def counted(row):
    """The counters of a status row, those of each volume under its name."""
    each = {volume["name"]: {key: volume[key] for key in ("captured_bytes", "holes", "reread_bytes")} for volume in row["volumes"]}
    return {**row["counters"], **each}


def instant(text):
    """Milliseconds since 1970 of what status shows; None is None."""
    return None if text is None else datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000


@contextlib.contextmanager
def copy_of_the_replica(tale, name):
    """A copy of one volume's replica as it is now, mounted outside both hosts."""
    copy, mount = tale.lab.path(f"copy-{name}.img"), tale.lab.path(f"copy-{name}")
    subprocess.run(["cp", "--sparse=always", tale.paths("beta")[name], copy], check=True)
    os.makedirs(mount, exist_ok=True)
    device = subprocess.run(["losetup", "--find", "--show", copy], check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mount", "-o", "nouuid" if "xfs" in name else "errors=remount-ro", device, mount], check=True)
        try:
            yield mount
        finally:
            subprocess.run(["umount", mount], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        os.remove(copy)


def at_rest(tale):
    """With the cable out, the standby has applied what it has committed."""
    def still(was=[None]):
        row = tale.group("beta")
        now, was[0] = (row["generation"], row["applied_generation"], row["counters"]["bytes_written"]), was[0]
        same, was[0] = was[0] == now, now
        return same
    wait_for("a standby at rest", 60, still, 0.7)


# ---- the stories ------------------------------------------------------------------------------------------------------

def writes_during_cuts(tale, rounds):
    """Cuts go on while both file systems are written, trimmed and synced."""
    for _ in range(rounds):
        tale.write("random", "files")
        time.sleep(4)
        tip = tale.equal()
    row = tale.group()
    counters = row["counters"]
    cuts = {volume["cut"] for volume in row["volumes"]}
    if counters["freeze_max_ms"] is not None or cuts != {"capture"} or not counters["bytes_captured"]:
        raise LabError(f"the cuts were not made from captured writes: {cuts}, {counters}")
    if not counters["checkpoints"] or not counters["checked_blocks"]:
        raise LabError(f"no checkpoint compared anything: {counters}")
    if counters["mismatched_blocks"]:
        raise LabError(f"{counters['mismatched_blocks']} blocks that nobody wrote differ: {tale.lab.last_words('alpha', 'agent', 5)}")
    return (f"generation {tip}, {counters['generations']} cuts, {counters['bytes_captured'] >> 20} MiB captured, {counters['holes']} holes, "
            f"{counters['checked_blocks']} blocks checked, {counters['repaired_blocks']} repaired")


def freeze_cuts(tale, rounds):
    """The fallback: the same, with the file systems frozen for each cut, and back to capture."""
    tale.kill_agent("alpha")
    tale.start("alpha", FREEZE)
    for _ in range(rounds):
        tale.write("random", "files")
        time.sleep(4)
        tip = tale.equal()
    counters = tale.group()["counters"]
    if counters["freeze_max_ms"] is None or counters["bytes_captured"]:
        raise LabError(f"no cut froze a mounted file system: {counters}")
    tale.kill_agent("alpha")
    tale.start("alpha")
    tale.write("random")
    time.sleep(2)
    tale.equal()
    return f"generation {tip}, {counters['generations']} cuts, longest freeze {counters['freeze_max_ms']:.0f} ms"


def discard_storm(tale, rounds):
    """Discards and write-zeroes are writes."""
    for _ in range(rounds):
        tale.write("files")
        for _ in range(6):
            for name in VOLUMES:
                tale.lab.exec("alpha", ["fstrim", f"/mnt/{name}"])
            time.sleep(0.3)
        tale.equal()
    return f"{rounds} rounds"


def killed_agents(tale, rounds):
    """Either agent is killed at a random moment, again and again; no bit and no generation is lost."""
    before = tale.group()["counters"]["comparisons"]
    hosts = []
    for number in range(rounds):
        host = tale.random.choice(list(HOSTS))
        hosts.append(host)
        tale.write(*tale.random.sample(["random", "files", "burst"], 2))
        time.sleep(tale.random.uniform(0.2, 1.5))
        tale.kill_agent(host)
        log = tale.lab.path("alpha", "log", "agent.log")
        said = os.path.getsize(log)
        time.sleep(tale.random.uniform(0, 0.5))
        tale.start(host)
        time.sleep(tale.random.uniform(0, 1))
        tale.equal()
        if host == "alpha":
            # The pinned bits must have been believed: its first word to the standby is that it goes on from them.
            with open(log, encoding="utf-8", errors="replace") as file:
                file.seek(said)
                first = next((line for line in file if " connected " in line), "it never connected")
            if "step=Incremental" not in first:
                raise LabError(f"kill {number + 1}: the pinned bits were not believed: {first.strip()}")
    after = tale.group()["counters"]["comparisons"]
    return f"{rounds} kills ({hosts.count('alpha')} of alpha, {hosts.count('beta')} of beta), comparisons {before} -> {after}"


def cut_cable(tale, rounds):
    """The cable is pulled in the middle of a transfer; nothing is compared in full afterwards."""
    for _ in range(rounds):
        tale.write("burst", "random")
        time.sleep(tale.random.uniform(0.5, 2))
        tale.lab.cable("beta", False)
        time.sleep(tale.random.uniform(1, 4))
        tale.lab.cable("beta", True)
        time.sleep(tale.random.uniform(0, 2))
        tale.equal()
    row = tale.group()
    return f"{rounds} cuts, {row['counters']['comparisons']} comparisons"


STAMPER = r"""
import os, sys
a = os.open(sys.argv[1] + "/stamp", os.O_RDWR | os.O_CREAT, 0o600)
b = os.open(sys.argv[2] + "/stamp", os.O_RDWR | os.O_CREAT, 0o600)
n = int(sys.argv[3])
while True:
    n += 1
    for fd in (a, b):
        os.pwrite(fd, n.to_bytes(8, "little") * 512, 4096 * (n % 64))
        os.fdatasync(fd)
"""


def stamps(path):
    """The stamps of a file, newest last; a torn block is None."""
    found = []
    with open(path, "rb") as file:
        data = file.read()
    for at in range(0, len(data), 4096):
        words = {data[at + i:at + i + 8] for i in range(0, 4096, 8)}
        if len(words) != 1:
            raise LabError(f"{path}: the block at {at} holds two stamps")
        found.append(int.from_bytes(words.pop(), "little"))
    return sorted(found)


def stamped_writer(tale, rounds):
    """One writer stamps both volumes in turn, each stamp durable before the next. Every state of the standby is a prefix of that."""
    last, seen = 0, []
    for number in range(rounds):
        argv = tale.lab.enter("alpha") + ["/usr/bin/python3", "-c", STAMPER, "/mnt/vol-ext4", "/mnt/vol-xfs", str(last)]
        tale.writers.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True))
        tale.write("random")
        time.sleep(tale.random.uniform(1.5, 3))
        tale.lab.cable("beta", False)

        # What the standby has committed by now, it applies without the network.
        at_rest(tale)
        newest = []
        for name in VOLUMES:
            with copy_of_the_replica(tale, name) as mount:
                newest.append(stamps(f"{mount}/stamp"))
        first, second = newest
        # The first volume is stamped first: it is level or one ahead, and no stamp before the newest is missing.
        if not second[-1] <= first[-1] <= second[-1] + 1:
            raise LabError(f"the two volumes are not of one instant: {first[-1]} and {second[-1]}")
        for name, found in zip(VOLUMES, newest):
            if found[-1] >= 64 and found != list(range(found[-1] - 63, found[-1] + 1)):
                raise LabError(f"{name}: stamps are missing before {found[-1]}: {found}")
        seen.append(first[-1])
        tale.lab.cable("beta", True)
        tale.rest()
        last = stamps_now(tale)
        tale.equal()
    return f"{rounds} states, newest stamps {seen}"


def stamps_now(tale):
    done = tale.lab.exec("alpha", ["/usr/bin/python3", "-c",
                                   "import sys; d=open('/mnt/vol-ext4/stamp','rb').read(); "
                                   "print(max(int.from_bytes(d[i:i+8],'little') for i in range(0,len(d),4096)))"])
    return int(done.stdout)


def flipped_bit(tale, _rounds):
    """One bit of the replica is flipped behind everybody's back: verify names the block, the next cycle mends it."""
    tale.equal()
    replica = tale.paths("beta")["vol-ext4"]
    block = tale.random.randrange(0, VOLUMES["vol-ext4"][1] // 4096)
    with open(replica, "r+b") as file:
        file.seek(block * 4096 + 77)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
        file.flush()
        os.fsync(file.fileno())
    found = tale.verb("alpha", "verify", GROUP, good=(4,))
    named = [(row["volume"], row["block"], row["blocks"]) for row in found["mismatched"]]
    if named != [("vol-ext4", block, 1)]:
        raise LabError(f"block {block} of vol-ext4 was flipped, verify found {named}")
    tale.equal()
    again = tale.verb("alpha", "verify", GROUP)
    if again["mismatched"]:
        raise LabError(f"verify still finds {again['mismatched']}")
    return f"block {block} found and mended, {again['compared_blocks']} blocks compared"


def second_agent(tale, _rounds):
    """Two agents on one state directory: the second is refused, the first does not notice."""
    done = tale.lab.doublure("alpha", ["agent"], check=False, timeout=60)
    if done.returncode != 5 or "STATE_DIR_HELD" not in done.stderr:
        raise LabError(f"the second agent ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    tale.equal()
    return done.stderr.strip().splitlines()[-1]


def garbage_on_the_port(tale, _rounds):
    """Rubbish, half a handshake and silence on the replication port do not disturb it."""
    address = (HOSTS["beta"][0], AGENT_PORT)
    script = ("import os,socket,sys,time\n"
              "for data in (b'GET / HTTP/1.0\\r\\n\\r\\n', os.urandom(65536), b'\\x16\\x03\\x01\\x02\\x00\\x01', b''):\n"
              "    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); s.settimeout(8)\n"
              "    try:\n        s.sendall(data); s.recv(1)\n    except OSError: pass\n    s.close()\n")
    tale.write("random")
    tale.lab.exec("alpha", ["/usr/bin/python3", "-c", script, address[0], str(address[1])], timeout=60)
    tale.equal()
    return "four kinds of rubbish"


def full_standby(tale, _rounds):
    """The standby's disk is full: the last committed generation stays, and replication goes on when there is room again."""
    state = os.path.dirname(os.path.dirname(tale.paths("beta")["vol-ext4"]))
    before = tale.group("beta")["generation"]
    # A small file system in the overflow's place: a transfer larger than the journal has no room there.
    overflow = subprocess.run(["find", state, "-type", "d", "-name", "overflow"], capture_output=True, text=True).stdout.split()
    if len(overflow) != 1:
        raise LabError(f"beta's overflow directory was not found: {overflow}")
    tale.kill_agent("beta")
    tale.lab.exec("beta", ["mount", "-t", "tmpfs", "-o", "size=1M,mode=0700", "tmpfs", overflow[0]])
    tale.start("beta")
    try:
        for name in VOLUMES:
            tale.lab.exec("alpha", ["dd", "if=/dev/urandom", f"of=/mnt/{name}/large", "bs=1M", "count=90", "conv=fsync", "status=none"])

        def refused():
            return "STANDBY_DISK_FULL" in tale.group()["fault_codes"]
        wait_for("the refusal", 60, refused, 0.2)
        tip = tale.group("beta")["generation"]
        if tip < before:
            raise LabError(f"the standby fell back from generation {before} to {tip}")
    finally:
        tale.kill_agent("beta")
        tale.lab.exec("beta", ["umount", overflow[0]])
        tale.start("beta")
    tale.equal()
    return f"refused at generation {tip}, caught up afterwards"


def kernel_without_btf(tale, _rounds):
    """A kernel that does not describe itself: doctor says so, a fresh agent says so and ships nothing, nothing is lost."""
    tale.write("random")
    tale.kill_agent("alpha")
    pins = tale.lab.exec("alpha", ["find", "/sys/fs/bpf/doublure", "-type", "f"]).stdout.split()
    if not pins:
        raise LabError("no pin was found below /sys/fs/bpf/doublure")
    tale.lab.exec("alpha", ["rm", "-r", "/sys/fs/bpf/doublure"])
    tale.lab.exec("alpha", ["mount", "-t", "tmpfs", "tmpfs", "/sys/kernel/btf"])
    try:
        tale.start("alpha")
        checks = tale.verb("alpha", "doctor", good=(3,))["checks"]
        if next(row["outcome"] for row in checks if row["name"] == "btf") != "failed":
            raise LabError(f"doctor did not notice: {checks}")
        wait_for("the word KERNEL_UNSUPPORTED", 20, lambda: "KERNEL_UNSUPPORTED" in tale.group()["fault_codes"], 0.2)
        tale.kill_agent("alpha")
    finally:
        tale.lab.exec("alpha", ["umount", "/sys/kernel/btf"])
    tale.start("alpha")
    tip = tale.equal()
    # The pins were gone: nothing of the time without them is known, so everything was compared.
    if tale.group()["counters"]["comparisons"] < 1:
        raise LabError("the tracker's gap was not answered by a full comparison")
    return f"said so, then compared in full, equal at generation {tip}"


def rotten_journal(tale, _rounds):
    """The standby's state falls back and its journal is wiped: what it had acknowledged is gone, and it says so and is made whole."""
    state = os.path.dirname(os.path.dirname(tale.paths("beta")["vol-ext4"]))
    found = subprocess.run(["find", os.path.join(state, "groups"), "-name", "ledger"], capture_output=True, text=True).stdout.split()
    if len(found) != 1:
        raise LabError(f"beta's ledger was not found: {found}")
    ledger, journal = found[0], os.path.join(os.path.dirname(found[0]), "journal")
    tale.kill_agent("beta")
    with open(ledger, "rb") as file:
        old = file.read()
    tale.start("beta")
    tale.write("random", "files")
    before = tale.group()["generation"]
    wait_for("some generations", 60, lambda: tale.group("beta")["generation"] > before + 5, 0.2)
    if tale.random.random() < 0.5:
        # A generation larger than the ring lies in a file of its own, which outlives the wiping below: then there is a gap.
        tale.lab.exec("alpha", ["dd", "if=/dev/urandom", "of=/mnt/vol-xfs/large", "bs=1M", "count=90", "conv=fsync", "status=none"])
        large = tale.group()["generation"]
        wait_for("the large generation", 60, lambda: tale.group("beta")["generation"] > large, 0.02)
    tale.kill_agent("beta")
    with open(ledger, "r+b") as file:
        file.write(old)
    with open(journal, "r+b") as file:
        # The superblocks and marks stay: they know what was promised.
        file.seek(16384)
        file.write(bytes(os.path.getsize(journal) - 16384))
    tale.start("beta")
    log = open(tale.lab.path("beta", "log", "agent.log"), encoding="utf-8", errors="replace").read()
    if "[CORRUPT]" not in log:
        raise LabError("the standby did not say that its journal lost something")
    tip = tale.equal()
    row = tale.group("beta")
    if row["syncing"] or row["faults"]:
        raise LabError(f"the standby was not made whole: syncing {row['syncing']}, {row['faults']}")
    return f"said so, compared in full, equal at generation {tip}"


TICKER = r"""
import os, sys, time
fd = os.open(sys.argv[1] + "/tick", os.O_RDWR | os.O_CREAT, 0o600)
n = int(sys.argv[2])
while True:
    n += 1
    os.pwrite(fd, n.to_bytes(8, "little") * 512, 4096 * (n % 64))
    os.fdatasync(fd)
    sys.stdout.write("%d %d\n" % (n, time.time() * 1000))
    time.sleep(0.02)
"""


def burst(tale, rounds):
    """A sync of a large page cache beside small durable writes: holes and rounds for that volume alone, a lag that is shown as it is,
    and captured cuts again without help."""
    tale.restart("alpha", FAST.replace('capture_ring = "8 MiB"', 'capture_ring = "4 MiB"'))
    worst = lost = 0
    for number in range(rounds):
        wait_for("a group in sync", 60, lambda: tale.group()["in_sync"], 0.1)
        start = counted(tale.group())
        ticks = tale.lab.path("ticks")
        with open(ticks, "w", encoding="ascii") as out:
            tale.script(TICKER, "/mnt/vol-xfs", number * 1_000_000, out=out)
            wait_for("capture", 20, lambda: counted(tale.group())["bytes_captured"] > start["bytes_captured"] + 65536, 0.05)
            before = counted(tale.group())
            tale.lab.exec("alpha", ["dd", "if=/dev/urandom", "of=/mnt/vol-ext4/large", "bs=1M", "count=150", "conv=notrunc", "status=none"])
            began = time.monotonic()
            storm = subprocess.Popen(tale.lab.enter("alpha") + ["sync", "-f", "/mnt/vol-ext4/large"], start_new_session=True)
            tale.writers.append(storm)
            last, lags = None, []
            # In the last round the cable is pulled in the middle; else the burst runs to its end.
            pulled = number == rounds - 1
            while storm.poll() is None or not last or time.monotonic() - began < 1.5:
                last = tale.group()
                if last["rpo_seconds"] is not None:
                    lags.append(last["rpo_seconds"])
                if pulled and counted(last)["rounds"] > before["rounds"]:
                    tale.lab.cable("beta", False)
                    break
                time.sleep(0.05)
            worst = max(worst, *lags)
            if pulled:
                # S9: whatever was promised last, by either side, the standby must hold.
                at_rest(tale)
                promised = max(row["recoverable_to_ms"] for row in (tale.group(), tale.group("beta")))
                tale.rest()
                with copy_of_the_replica(tale, "vol-xfs") as mount:
                    held = stamps(f"{mount}/tick")[-1]
                with open(ticks, encoding="ascii") as file:
                    durable = [tuple(map(int, line.split())) for line in file.read().splitlines()[:-1]]
                safe = max((n for n, at in durable if at <= promised), default=0)
                lost = durable[-1][0] - held
                if not safe or held < safe:
                    raise LabError(f"tick {safe} was durable before {promised} ms, which is promised, and the standby holds {held} only")
                tale.lab.cable("beta", True)
            else:
                # By itself: more generations from captured writes, and the small ones beside the burst were captured.
                storm.wait(120)
                wait_for("captured cuts after the burst", 60, lambda: (tale.group()["rpo_seconds"] or 99) < 1, 0.05)
                calm = counted(tale.group())
                time.sleep(1)
                row = tale.group()
                after = counted(row)
                if not (row["in_sync"] and after["generations"] > calm["generations"] + 3 and after["bytes_captured"] > calm["bytes_captured"]):
                    raise LabError(f"captured cuts did not come back: {row['state']}, {calm}, then {after}")
                large = after["vol-ext4"]["holes"] - before["vol-ext4"]["holes"]
                small = after["vol-xfs"]["holes"] - before["vol-xfs"]["holes"]
                if not large or after["rounds"] == before["rounds"]:
                    raise LabError(f"the burst made {large} holes and {after['rounds'] - before['rounds']} rounds: it was none")
                if small or after["vol-xfs"]["captured_bytes"] - before["vol-xfs"]["captured_bytes"] < 40 * 4096:
                    raise LabError(f"the burst of one volume cost the other its captures: {before['vol-xfs']}, then {after['vol-xfs']}")
        tale.equal()
    counters = counted(tale.group())
    tale.restart("alpha")
    return (f"{rounds} bursts, {counters['vol-ext4']['holes']} holes in one volume and {counters['vol-xfs']['holes']} in the other, "
            f"{counters['rounds']} rounds, worst lag shown {worst:.1f} s, lag p99 {counters['lag_p99_ms']:.0f} ms, "
            f"{lost} ticks beyond the promise lost with the cable")


STEADY = r"""
import os, random, sys, time
fd = os.open(sys.argv[1] + "/steady", os.O_RDWR | os.O_CREAT | os.O_DSYNC, 0o600)
while True:
    for _ in range(8):
        os.pwrite(fd, os.urandom(65536), 65536 * random.randrange(112))
    time.sleep(0.08)
"""


def slow_link(tale, _rounds):
    """A writer that is faster than the link, until the cap is lifted; then until the writer stops. No help, nothing compared in full."""
    words = []
    for lifted in (True, False):
        tale.restart("alpha", FAST + f'bandwidth = "{"2 MiB" if lifted else "1 MiB"}"\n')
        since = tale.log("alpha")
        wait_for("a group in sync", 60, lambda: tale.group()["in_sync"], 0.1)
        before = tale.group()
        for name in VOLUMES:
            tale.script(STEADY, f"/mnt/{name}")
        behind = []
        end = time.monotonic() + 7
        while time.monotonic() < end:
            row = tale.group()
            behind.append(row["rpo_seconds"] if row["rpo_seconds"] is not None else -1)
            time.sleep(0.25)
        if max(behind) < 2:
            raise LabError(f"the writer was not faster than the link: at most {max(behind)} s behind")
        if lifted:
            tale.restart("alpha")
            began = time.monotonic()
            wait_for("catching up under the writer", 120, lambda: (tale.group()["rpo_seconds"] or 99) < 1 and tale.group()["generation"] > before["generation"], 0.1)
            words.append(f"{max(behind):.1f} s behind, level {time.monotonic() - began:.1f} s after the cap was lifted")
        else:
            began = time.monotonic()
            tale.rest()
            wait_for("catching up at rest", 180, lambda: (tale.group()["rpo_seconds"] or 99) < 1.5 and tale.group()["state"] == "replicating", 0.1)
            words.append(f"{max(behind):.1f} s behind, level {time.monotonic() - began:.1f} s after the writer stopped")
        row = tale.group()
        if row["counters"]["comparisons"]:
            raise LabError("something was compared in full")
        broken = [line for line in tale.said("alpha", since) if "[PEER_UNREACHABLE]" in line or "[TRACKER_DOUBT]" in line]
        if broken and not lifted:
            raise LabError(f"a slow link was taken for a broken one: {broken[0]}")
        tale.equal()
    tale.restart("alpha")
    return "; ".join(words)


SCRUB = FAST.replace('checkpoint_interval = "2s"', 'checkpoint_interval = "1s"')


def place_of(tale, name, file, at):
    """The block of the image that holds a block of a file: what the file system says, not what is assumed."""
    out = tale.lab.exec("alpha", ["filefrag", "-v", "-b4096", f"/mnt/{name}/{file}"]).stdout
    for first, last, start in re.findall(r"^ *\d+: *(\d+)\.\. *(\d+): *(\d+)\.\.", out, re.M):
        if int(first) <= at <= int(last):
            return int(start) + at - int(first)
    raise LabError(f"{file} has no block {at}: {out}")


def damage(path, block):
    """Sixteen bytes of an image change behind its device."""
    with open(path, "r+b") as file:
        file.seek(block * 4096 + 512)
        old = file.read(16)
        file.seek(block * 4096 + 512)
        file.write(bytes(byte ^ 0x55 for byte in old))
        file.flush()
        os.fsync(file.fileno())


def silent_damage(tale, _rounds):
    """Somebody writes to the primary's image behind its device. In a block that nobody writes: an alarm, the block named, and shipped.
    In one that was written just now: shipped and counted, no alarm."""
    for name in VOLUMES:
        tale.lab.exec("alpha", ["dd", "if=/dev/urandom", f"of=/mnt/{name}/cold", "bs=1M", "count=8", "conv=fsync", "status=none"])
    tale.restart("alpha", SCRUB)
    first = tale.group()["counters"]["checkpoints"]
    # Both volumes once round: until then what differs may have been written in the agent's last life.
    tale.write("random")
    wait_for("the scrub's first round", 60, lambda: tale.group()["counters"]["checkpoints"] > first + 9, 0.2)
    words = []
    for name in VOLUMES:
        block, image = place_of(tale, name, "cold", 1000), tale.paths("alpha")[name]
        before, since, began = tale.group()["counters"], tale.log("alpha"), time.monotonic()
        if "VERIFY_MISMATCH" in tale.group()["fault_codes"] or before["mismatched_blocks"]:
            raise LabError(f"an alarm before anything was damaged: {tale.said('alpha')[-5:]}")
        damage(image, block)
        wait_for(f"the alarm for block {block} of {name}", 60, lambda: "VERIFY_MISMATCH" in tale.group()["fault_codes"], 0.1)
        took = time.monotonic() - began
        found = [line for line in tale.said("alpha", since) if "ERROR" in line and "nobody had written" in line]
        if len(found) != 1 or f"block={block} " not in found[0] + " " or f"volume={name}" not in found[0]:
            raise LabError(f"block {block} of {name} was damaged, the log says {found}")
        if tale.group()["counters"]["mismatched_blocks"] != 1:
            raise LabError(f"one block was damaged, {tale.group()['counters']['mismatched_blocks']} are counted")
        words.append(f"{name} {took:.1f} s")
        tale.equal()
        tale.verb("alpha", "verify", GROUP)
        tale.restart("alpha", SCRUB)
        tale.write("random")
        first = tale.group()["counters"]["checkpoints"]
        wait_for("the scrub's first round", 60, lambda: tale.group()["counters"]["checkpoints"] > first + 9, 0.2)
    tale.rest()
    tale.verb("alpha", "sync", GROUP, "--wait")
    # A block that is written just after a checkpoint began is compared by the next one, as written.
    # (XFS: a small ext4 has blocks of 1 KiB, its files do not begin on ours, and of a block written in part nothing is known.)
    block, image = place_of(tale, "vol-xfs", "cold", 500), tale.paths("alpha")["vol-xfs"]
    before = tale.group()["counters"]
    wait_for("a checkpoint", 20, lambda: tale.group()["counters"]["checkpoints"] > before["checkpoints"], 0.02)
    tale.lab.exec("alpha", ["dd", "if=/dev/urandom", "of=/mnt/vol-xfs/cold", "bs=4k", "count=1", "seek=500", "conv=notrunc,fdatasync", "oflag=direct", "status=none"])
    wait_for("its generation", 20, lambda: tale.group()["counters"]["bytes_captured"] > before["bytes_captured"] and tale.group()["in_sync"], 0.02)
    damage(image, block)
    wait_for("the repair", 60, lambda: tale.group()["counters"]["repaired_blocks"] > before["repaired_blocks"], 0.1)
    row = tale.group()
    if row["counters"]["mismatched_blocks"] or "VERIFY_MISMATCH" in row["fault_codes"]:
        raise LabError(f"damage to a block that was written raised the alarm: {tale.said('alpha')[-5:]}")
    tale.equal()
    tale.restart("alpha")
    return f"alarm after {', '.join(words)}; a written block repaired without one"


MAPPER = r"""
import mmap, os, random, sys, time
size = 16 << 20
fd = os.open(sys.argv[1] + "/mapped", os.O_RDWR | os.O_CREAT, 0o600)
os.posix_fallocate(fd, 0, size)
map = mmap.mmap(fd, size)
# A process of its own: the interpreter holds its threads while one of them flushes.
if os.fork() == 0:
    hot = [page * 4096 for page in range(48)]
    while os.getppid() != 1:
        # Then a rest, in which nothing is written back: what was copied and what the disk holds stay different for that long.
        if time.time() % 4 > 1.5:
            time.sleep(0.05)
        new = os.urandom(8)
        for at in hot:
            map[at:at + 8] = new
            map[at + 4088:at + 4096] = new
        at = random.randrange(size // 4096) * 4096
        map[at:at + 8] = new
    os._exit(0)
while True:
    if time.time() % 4 > 1.4:
        time.sleep(0.05)
    else:
        map.flush()
"""


def mmap_writer(tale, rounds):
    """Pages change through a mapping while they are written back, across kills of the agent: never an alarm."""
    repaired = checked = told = 0
    # A round in which no page happened to change in flight shows nothing.
    while told < rounds or not repaired:
        if told > rounds + 4:
            raise LabError("no page changed while it was written: nothing was shown")
        told += 1
        tale.restart("alpha", SCRUB)
        for name in VOLUMES:
            tale.script(MAPPER, f"/mnt/{name}")
        for pause in (5, 5, 8):
            time.sleep(tale.random.uniform(pause, pause + 1))
            counters = tale.group()["counters"]
            repaired, checked = repaired + counters["repaired_blocks"], checked + counters["checked_blocks"]
            if counters["mismatched_blocks"]:
                break
            tale.restart("alpha", SCRUB)
        tale.equal()
        counters = tale.group()["counters"] if not counters["mismatched_blocks"] else counters
        repaired, checked = repaired + counters["repaired_blocks"], checked + counters["checked_blocks"]
        if counters["mismatched_blocks"]:
            raise LabError(f"{counters['mismatched_blocks']} blocks of a mapping raised the alarm: {[line for line in tale.said('alpha') if 'check:' in line][-5:]}")
    tale.restart("alpha")
    return f"{told} rounds, {checked} blocks checked, {repaired} repaired, no alarm"


def switches(tale, host):
    """Voluntary context switches of an agent's threads so far, by thread."""
    script = 'cd /proc/$1/task && for t in *; do echo "$t $(cat $t/comm) $(grep ^voluntary $t/status)"; done'
    counts = {}
    for line in tale.lab.exec(host, ["sh", "-c", script, "sh", str(tale.agents[host])]).stdout.splitlines():
        thread, name, *_, count = line.split()
        counts[f"{name}/{thread}"] = int(count)
    return counts


def rings(tale):
    """Ring buffers of at least a MiB that alpha's agent holds, as descriptors and as mappings."""
    script = 'grep -h -A9 "map_type:.27" /proc/$1/fdinfo/* | grep max_entries; grep bpf-map /proc/$1/maps'
    found = tale.lab.exec("alpha", ["sh", "-c", script, "sh", str(tale.agents["alpha"])], check=False).stdout.splitlines()
    sizes = [int(line.split()[1]) for line in found if line.startswith("max_entries")]
    mapped = [int(end, 16) - int(start, 16) for start, end in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) r--s", "\n".join(found), re.M)]
    return sum(size >= 1 << 20 for size in sizes) + sum(size >= 2 << 20 for size in mapped)


def idle(tale, _rounds):
    """Nobody writes: a few wake-ups for the heartbeat and no more; the first write is shipped at once; the ring's memory goes back after
    a long rest, and everything works on."""
    slow = FAST.replace('checkpoint_interval = "2s"', 'checkpoint_interval = "20s"')
    tale.restart("alpha", slow)
    tale.equal()
    time.sleep(3)
    wakeups, before = {}, {host: switches(tale, host) for host in HOSTS}
    generation = tale.group()["generation"]
    # Nothing is asked of the agents meanwhile: a question wakes them too.
    time.sleep(10)
    for host in HOSTS:
        after = switches(tale, host)
        each = {name: (count - before[host].get(name, 0)) / 10 for name, count in after.items()}
        wakeups[host] = sum(each.values())
        if wakeups[host] > 40:
            raise LabError(f"{host}'s agent wakes up {wakeups[host]} times a second although nobody writes: {each}")
    if tale.group()["generation"] > generation + 1:
        raise LabError(f"generations {generation} to {tale.group()['generation']} of nothing")
    # The first write after a rest, several times, at moments that the heartbeat does not know.
    took = []
    for _ in range(4):
        time.sleep(1.5 + tale.random.random())
        generation = tale.group("beta")["generation"]
        tale.lab.exec("alpha", ["dd", "if=/dev/urandom", "of=/mnt/vol-xfs/first", "bs=4k", "count=1", "conv=notrunc,fdatasync", "oflag=direct", "status=none"])
        began = time.monotonic()
        wait_for("the first write on the standby", 30, lambda: tale.group("beta")["generation"] > generation, 0.005)
        took.append((time.monotonic() - began) * 1000)
    lag = tale.group()["counters"]["lag_max_ms"]
    tale.equal()
    # The rest of two checkpoints: the ring goes.
    tale.restart("alpha", SCRUB)
    tale.lab.exec("alpha", ["dd", "if=/dev/urandom", "of=/mnt/vol-xfs/first", "bs=4k", "count=1", "conv=notrunc,fdatasync", "status=none"])
    wait_for("capture", 20, lambda: rings(tale) > 0, 0.02)
    wait_for("the return of the ring's memory", 60, lambda: rings(tale) == 0, 0.2)
    row = tale.group()
    held = sum(volume["dirty_bytes"] for volume in row["volumes"])
    if held:
        raise LabError(f"a group at rest still holds {held} bytes as changed: {row['volumes']}")
    # The file systems themselves write now and then.
    def writes():
        return [open(f"/sys/block/{os.path.basename(volume['device'])}/stat", encoding="ascii").read().split()[4:7] for volume in row["volumes"]]
    for _ in range(3):
        wrote = writes()
        time.sleep(1.2)
        if rings(tale) and writes() == wrote:
            raise LabError("the ring came back although nobody wrote")
    tale.write("random")
    time.sleep(1)
    tale.equal()
    wait_for("the return of the ring's memory", 60, lambda: rings(tale) == 0, 0.2)
    tale.restart("alpha")
    took.sort()
    return (f"{wakeups['alpha']:.1f} wake-ups a second on alpha and {wakeups['beta']:.1f} on beta , first write on the "
            f"standby after {took[len(took) // 2]:.0f} ms, at most {took[-1]:.0f} ms, largest lag {lag} ms; the ring goes and comes back")


def refused_capture(tale, _rounds):
    """A host that must not know where its memory lies, and one whose owner wants freezes: both say so, and replicate with freezes."""
    reasons = []
    # The frame numbers of a process without the right to see them: all zero.
    hidden = ["sh", "-c", 'mount --bind /dev/zero /proc/$$/pagemap && exec "$@"', "sh"]
    for extra, within, wanted, doctored in (
            (FAST, hidden, "pagemap", True), (FREEZE, (), 'mode = "freeze"', False)):
        tale.restart("alpha", extra, within)
        wait_for("a group in sync", 60, lambda: tale.group()["in_sync"], 0.1)
        tale.write("random")
        time.sleep(2)
        row = tale.group()
        kinds = {(volume["cut"], volume["cut_reason"]) for volume in row["volumes"]}
        if {cut for cut, _ in kinds} != {"freeze"} or any(wanted not in (reason or "") for _, reason in kinds):
            raise LabError(f"{wanted} is the reason for a freeze, status says {kinds}")
        reasons += [reason for _, reason in kinds]
        shown = tale.lab.doublure("alpha", ["status"], check=False).stdout
        line = [line for line in shown.splitlines() if line.strip().startswith("cut ")]
        if len(line) != 1 or "freeze" not in line[0] or "stall p99" not in line[0] or wanted not in line[0]:
            raise LabError(f"status for people does not say how it cuts and why: {shown}")
        checks = tale.verb("alpha", "doctor", good=(0, 4))["checks"]
        capture = next(check for check in checks if check["name"] == "capture")
        if (capture["outcome"] == "degraded") != doctored or (doctored and wanted not in capture["detail"]):
            raise LabError(f"doctor says of capture {capture}")
        tale.equal()
        counters = tale.group()["counters"]
        if counters["freeze_max_ms"] is None or counters["bytes_captured"]:
            raise LabError(f"no cut froze a mounted file system: {counters}")
    tale.restart("alpha")
    tale.write("random")
    time.sleep(1)
    row = tale.group()
    if {(volume["cut"], volume["cut_reason"]) for volume in row["volumes"]} != {("capture", None)}:
        raise LabError(f"capture did not come back: {row['volumes']}")
    line = [line for line in tale.lab.doublure("alpha", ["status"], check=False).stdout.splitlines() if line.strip().startswith("cut ")]
    if not line or "capture: no stall" not in line[0]:
        raise LabError(f"status for people does not say how it cuts: {line}")
    tale.equal()
    return f"{'; '.join(reasons)}. And then: {' '.join(line[0].split())}"


def killed_in_bursts(tale, rounds):
    """The primary's agent is killed in the middle of rounds, and held for seconds while its ring overflows."""
    inside = held = 0
    for number in range(rounds):
        wait_for("a group in sync", 60, lambda: tale.group()["in_sync"], 0.1)
        before = counted(tale.group())
        tale.write("burst", "random")
        if number % 2 == 0:
            with contextlib.suppress(LabError):
                wait_for("rounds", 6, lambda: counted(tale.group())["rounds"] > before["rounds"], 0.02)
                inside += 1
            time.sleep(tale.random.uniform(0, 0.1))
            tale.kill_agent("alpha")
            time.sleep(tale.random.uniform(0, 1))
            since = tale.log("alpha")
            tale.start("alpha")
            wait_for("a word of its footing", 60, lambda: any(" connected " in line for line in tale.said("alpha", since)), 0.05)
            first = next(line for line in tale.said("alpha", since) if " connected " in line)
            if "step=Incremental" not in first:
                raise LabError(f"kill {number + 1}: the pinned bits were not believed: {first}")
        else:
            time.sleep(tale.random.uniform(0.5, 1.5))
            tale.signal_agent("alpha", "STOP")
            time.sleep(tale.random.uniform(3, 6))
            tale.signal_agent("alpha", "CONT")
            time.sleep(0.5)
            wait_for("holes of the time in which it was held", 30, lambda: counted(tale.group())["holes"] > before["holes"], 0.05)
            held += counted(tale.group())["holes"] - before["holes"]
        tale.equal()
        if tale.group()["counters"]["comparisons"]:
            raise LabError("something was compared in full")
    return f"{rounds} rounds, {inside} kills between rounds, {held} holes while it was held"


def mixed_modes(tale, rounds):
    """The primary goes from mode to mode under load, and the standby is restarted meanwhile: equal each time, nothing compared."""
    interval = 'mode = "interval"\ninterval = "300ms"\ncheckpoint_interval = "1s"\ncut_max = "8 MiB"\njournal = "64 MiB"\n'
    order, words = [FAST, interval, FREEZE], []
    for number in range(rounds):
        tale.write(*tale.random.sample(["random", "files", "burst"], 2))
        extra = order[number % 3] if number < 4 else tale.random.choice(order)
        time.sleep(tale.random.uniform(0.3, 1))
        tale.restart("alpha", extra)
        time.sleep(tale.random.uniform(0.5, 1.5))
        tale.restart("beta")
        time.sleep(tale.random.uniform(1, 2))
        tale.equal()
        counters = tale.group()["counters"]
        froze, captured = counters["freeze_max_ms"] is not None, counters["bytes_captured"] > 0
        if (froze, captured) != ((True, False) if extra is FREEZE else (False, True)):
            raise LabError(f"{extra!r}: froze {froze}, captured {captured}")
        if counters["comparisons"] or counters["mismatched_blocks"]:
            raise LabError(f"{extra!r}: {counters['comparisons']} comparisons, {counters['mismatched_blocks']} mismatches")
        words.append("freeze" if extra is FREEZE else "interval" if extra is interval else "continuous")
    tale.restart("alpha")
    return " -> ".join(words)


def interval_cuts(tale, rounds):
    """One cut an interval from captured writes: capture is on for the cut alone, nothing is frozen."""
    tale.restart("alpha", 'mode = "interval"\ninterval = "500ms"\ncheckpoint_interval = "1s"\ncapture_ring = "8 MiB"\ncut_max = "8 MiB"\njournal = "64 MiB"\n')
    for _ in range(rounds):
        tale.write("random", "files")
        time.sleep(4)
        tip = tale.equal()
    row = tale.group()
    counters = row["counters"]
    if counters["freeze_max_ms"] is not None or {volume["cut"] for volume in row["volumes"]} != {"capture"} or row["mode"] != "interval":
        raise LabError(f"the cuts were not made from captured writes: {row}")
    if not counters["bytes_captured"] or counters["bytes_captured"] > counters["bytes_changed"] / 2:
        raise LabError(f"between two cuts capture is off: {counters}")
    if not counters["checked_blocks"] or counters["mismatched_blocks"]:
        raise LabError(f"checks: {counters}")
    tale.restart("alpha")
    return f"generation {tip}, {counters['generations']} cuts, {counters['bytes_captured'] >> 10} KiB captured, {counters['bytes_read'] >> 20} MiB read"


STORIES = [
    ("writes_during_cuts", writes_during_cuts, 2, 40),
    ("burst", burst, 3, 30),
    ("slow_link", slow_link, 1, 1),
    ("silent_damage", silent_damage, 1, 1),
    ("mmap_writer", mmap_writer, 1, 20),
    ("idle", idle, 1, 1),
    ("interval_cuts", interval_cuts, 1, 20),
    ("mixed_modes", mixed_modes, 4, 60),
    ("refused_capture", refused_capture, 1, 1),
    ("killed_in_bursts", killed_in_bursts, 4, 100),
    ("freeze_cuts", freeze_cuts, 1, 4),
    ("discard_storm", discard_storm, 2, 40),
    ("stamped_writer", stamped_writer, 3, 200),
    ("cut_cable", cut_cable, 3, 100),
    ("flipped_bit", flipped_bit, 1, 1),
    ("second_agent", second_agent, 1, 1),
    ("garbage_on_the_port", garbage_on_the_port, 1, 1),
    ("full_standby", full_standby, 1, 1),
    ("rotten_journal", rotten_journal, 1, 5),
    ("kernel_without_btf", kernel_without_btf, 1, 5),
    ("killed_agents", killed_agents, 10, 500),
]


def main():
    wanted = [a for a in sys.argv[1:] if not a.startswith("--")]
    long = "--long" in sys.argv or os.environ.get("DOUBLURE_LONG") == "1"
    loud = "--loud" in sys.argv
    unknown = set(wanted) - {name for name, *_ in STORIES}
    if unknown:
        say(f"stories: no story is called {', '.join(sorted(unknown))}; there are {', '.join(name for name, *_ in STORIES)}")
        return 2
    seed = int(os.environ.get("DOUBLURE_SEED") or random.SystemRandom().randrange(1 << 32))
    say(f"seed {seed}")
    adopt_orphans()
    passed = failed = 0
    try:
        with whole_lab() as lab:
            tale = Tale(lab, seed)
            try:
                tale.set_up()
                for name, story, short, many in STORIES:
                    if wanted and name not in wanted:
                        continue
                    began, since = time.monotonic(), {host: tale.log(host) for host in HOSTS}
                    try:
                        tale.tidy()
                        words = story(tale, many if long else short)
                        passed += 1
                        say(f"  ok      {name:<22} {time.monotonic() - began:6.1f} s  {words}")
                        for complaint in tale.complaints(since) if loud else []:
                            say(f"            {complaint}")
                    except LabError as error:
                        failed += 1
                        say(f"  FAILED  {name:<22} {time.monotonic() - began:6.1f} s  {error}")
                        for host in HOSTS:
                            say(f"          {host}'s agent said last: {lab.last_words(host, 'agent', 12)}")
                        # What a failed story leaves behind would fail the next ones for the wrong reason; they count as failed.
                        rest = [n for n, *_ in STORIES[[n for n, *_ in STORIES].index(name) + 1:] if not wanted or n in wanted]
                        failed += len(rest)
                        say(f"  FAILED  not told after that: {', '.join(rest) or 'none'}")
                        break
            finally:
                tale.rest()
    except (LabError, KeyboardInterrupt) as error:
        failed += 1
        say(f"  FAILED  the lab: {error}")
    say(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
