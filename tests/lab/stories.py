#!/usr/bin/env python3
"""Stories on two real hosts: what happens to the replica when things go wrong, told one by one.

    stories.py [--long] [STORY...]     without a name, all of them

Every story ends the same way: writers are stopped, one last cut is taken, and the standby's replica is compared with the primary's
device byte for byte. The group has two volumes, ext4 and XFS, mounted and written on alpha while everything else goes on.
Randomness comes from one seed, printed first (DOUBLURE_SEED sets it), so that a failing run can be told again.
"""
import contextlib
import json
import os
import random
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

    def start(self, host, extra=FAST):
        self.agents[host] = self.lab.agent(host, extra)

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
        def still(was=[None]):
            row = tale.group("beta")
            now, was[0] = (row["generation"], row["applied_generation"], row["counters"]["bytes_written"]), was[0]
            same, was[0] = was[0] == now, now
            return same
        wait_for("a standby at rest", 60, still, 0.7)
        newest = []
        for name in VOLUMES:
            copy = tale.lab.path(f"copy-{name}.img")
            subprocess.run(["cp", "--sparse=always", tale.paths("beta")[name], copy], check=True)
            mount = tale.lab.path(f"copy-{name}")
            os.makedirs(mount, exist_ok=True)
            device = subprocess.run(["losetup", "--find", "--show", copy], check=True, capture_output=True, text=True).stdout.strip()
            try:
                subprocess.run(["mount", "-o", "nouuid" if "xfs" in name else "errors=remount-ro", device, mount], check=True)
                try:
                    newest.append(stamps(f"{mount}/stamp"))
                finally:
                    subprocess.run(["umount", mount], check=True)
            finally:
                subprocess.run(["losetup", "--detach", device], check=True)
                os.remove(copy)
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


STORIES = [
    ("writes_during_cuts", writes_during_cuts, 2, 40),
    ("freeze_cuts", freeze_cuts, 1, 4),
    ("discard_storm", discard_storm, 2, 40),
    ("stamped_writer", stamped_writer, 4, 200),
    ("cut_cable", cut_cable, 4, 100),
    ("flipped_bit", flipped_bit, 1, 1),
    ("second_agent", second_agent, 1, 1),
    ("garbage_on_the_port", garbage_on_the_port, 1, 1),
    ("full_standby", full_standby, 1, 1),
    ("rotten_journal", rotten_journal, 1, 5),
    ("kernel_without_btf", kernel_without_btf, 1, 5),
    ("killed_agents", killed_agents, 20, 500),
]


def main():
    wanted = [a for a in sys.argv[1:] if not a.startswith("--")]
    long = "--long" in sys.argv or os.environ.get("DOUBLURE_LONG") == "1"
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
                    began = time.monotonic()
                    try:
                        words = story(tale, many if long else short)
                        passed += 1
                        say(f"  ok      {name:<22} {time.monotonic() - began:6.1f} s  {words}")
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
