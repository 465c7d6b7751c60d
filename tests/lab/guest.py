#!/usr/bin/env python3
"""Guests: this project's kernel tests on other kernels than this machine's, in an emulator.

    guest.py KERNEL [options]                 the tests that need root, one boot, a table at the end
    guest.py KERNEL [options] -- COMMAND...   a command as root in a guest; its output and exit code are this command's
    guest.py --list                           which tests would run by default, and which are left out and why

KERNEL is the beginning of a version: `6.1`, `7`, `7.2`. The newest cloud kernel of Debian that begins so is fetched through apt,
which checks its signature, and kept; a kept one is used without asking again.

    --test NAME      a file of tests/ without .rs; again for more (default: see DEFAULT below)
    --only WORD      only tests whose name holds WORD; again for more. Lifts the default's exceptions.
    --skip WORD      no tests whose name holds WORD; again for more
    --release        tests built in release mode (faster in an emulator; debug assertions are off)
    --with FILE      copies FILE to /guest/ ; again for more
    --minutes N      the guest is ended after N minutes of wall clock (default 20)
    --cores N        of the guest (default 2: with one there would be no races)
    --fresh          asks the archive for a newer kernel than the one kept
    --console        shows the guest's kernel messages at the end

The emulator is QEMU without hardware help (TCG): a processor some 25 times slower, with several cores. Nothing here needs root on this
machine. The guest has no network; its root is an ext4 image made anew for each boot from this machine's own programs, and thrown away.
DOUBLURE_LAB names the work directory; DOUBLURE_DEBIAN an archive, where apt here knows none of Debian.
"""
import contextlib
import ctypes
import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import report
from lab import REPO, Lab, LabError, tell

# One before bpf_loop's friends and dynptrs grew up, one where programs at tracepoints can be preempted.
KERNELS = ("6.1", "7")
DEFAULT = ("root_tracker", "root_device", "root_host")
PROGRAM = "doublure"
# Left out by default: what an emulator cannot tell, never what fails. (file, test) -> why.
LEFT_OUT = {}
SUITES = ("bookworm", "trixie", "trixie-backports", "sid")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Busybox fills in for the many small ones; its own shell would prefer its losetup and mount to the real ones.
# What the tests and a person at a guest call; where this machine lacks one, the guest lacks it.
NEEDED = ("sh", "busybox", "losetup", "mount", "umount", "mkfs.ext4", "mkfs.xfs", "blkdiscard", "fsfreeze", "fstrim", "partx", "addpart",
          "delpart", "mknod", "dd", "sync", "fio", "modprobe", "blockdev", "stat", "cp")
WELCOME = ("mkfs.btrfs", "btrfs", "xfs_repair", "xfs_logprint", "xfs_io", "e2fsck", "dmsetup", "lvm", "bpftool", "strace", "findmnt", "lsblk", "blkid",
           "wipefs", "setpriv", "dumpe2fs", "unshare", "nsenter", "bash")
# The rest comes by itself when it is mounted.
MODULES = ("loop", "zram")
# The verdict stands at the line's end, after what a test's children wrote past libtest.
# A guest comes up in 3 to 10 s. One that did not in this time hangs (seen once in some 40 boots): it is started again.
UP_SECONDS, BOOTS = 120, 3
TEST_LINE = re.compile(r"^test (\S+) \.\.\. (?:.*\W)?(ok|FAILED)$")


def tool(name):
    found = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if not found and name in NEEDED + ("qemu-system-x86_64", "mke2fs", "depmod", "dpkg-deb", "apt-get"):
        raise LabError(f"{name} is not on this machine: run ./dev install guests")
    return found


def run(argv, **options):
    """A helper command; LabError with its last words when it fails."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, **options)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise LabError(f"{' '.join(argv[:3])} ended with {done.returncode}: {words}")
    return done.stdout


# ---- kernels ------------------------------------------------------------------------------------------------------------


def version(text):
    """Numbers of a version, for ordering: 7.3.4-1~bpo13+1 comes after 7.2.13-1."""
    return tuple(int(word) for word in re.findall(r"\d+", text))


def begins(release, word):
    """Whether a release like 6.1.0-56-cloud-amd64 is of the kernel that `word` names: 6.1 is, 6.12 is not."""
    return release == word or release.startswith((word + ".", word + "-", word + "+"))


class Kernels:
    """Kernels unpacked under the lab's directory: RELEASE/{vmlinuz,package,lib/modules/RELEASE}."""

    def __init__(self, directory):
        self.dir = os.path.join(directory, "kernels")
        self.apt = os.path.join(directory, "apt")

    def get(self, word, fresh):
        """The directory of the newest kernel that `word` names."""
        if not re.fullmatch(r"\d+(\.\d+)*", word):
            raise LabError(f"{word} is no kernel version: say 6.1, 7 or 7.2")
        kept = [name for name in self.kept() if begins(name, word)]
        if kept and not fresh:
            return os.path.join(self.dir, max(kept, key=version))
        return self.fetch(word)

    def kept(self):
        return [name for name in (os.listdir(self.dir) if os.path.isdir(self.dir) else ()) if not name.startswith("making.")]

    def archives(self):
        """Debian's archive and its security archive, as apt on this machine reaches them."""
        named = os.environ.get("DOUBLURE_DEBIAN")
        if named:
            return {"main": named.rstrip("/")}
        found = {}
        rows = run([tool("apt-get"), "indextargets", "--format", "$(ORIGIN)|$(RELEASE)|$(REPO_URI)", "Created-By: Packages"])
        for origin, release, uri in (row.split("|") for row in rows.splitlines()):
            if origin == "Debian":
                found.setdefault("security" if release.endswith("-security") else "main", uri.rstrip("/"))
        if "main" not in found:
            raise LabError("apt on this machine knows no archive of Debian, whose kernels the guests boot: run apt-get update, or name one in DOUBLURE_DEBIAN")
        return found

    def ask(self, *argv):
        return run(list(argv), cwd=self.apt, env={**os.environ, "APT_CONFIG": os.path.join(self.apt, "apt.conf"), "LC_ALL": "C.UTF-8"})

    def update(self):
        """An apt of its own, which knows all suites: nothing of it reaches this machine's."""
        if not os.path.exists(KEYRING):
            raise LabError("the guests' kernels are signed by Debian, whose keys are missing: install debian-archive-keyring")
        archives = self.archives()
        for sub in ("lists/partial", "cache/archives/partial"):
            os.makedirs(os.path.join(self.apt, sub), exist_ok=True)
        lines = [f"deb [arch=amd64 signed-by={KEYRING}] {archives['main']} {suite} main" for suite in SUITES]
        if "security" in archives:
            lines += [f"deb [arch=amd64 signed-by={KEYRING}] {archives['security']} {suite}-security main" for suite in ("bookworm", "trixie")]
        settings = {"Dir::State::lists": os.path.join(self.apt, "lists"), "Dir::Cache": os.path.join(self.apt, "cache"),
                    "Dir::Etc::sourcelist": os.path.join(self.apt, "sources.list"), "Dir::Etc::sourceparts": "/nonexistent",
                    "Dir::State::status": "/dev/null", "APT::Architecture": "amd64", "APT::Sandbox::User": "root",
                    "Acquire::Languages": "none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
                    "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false"}
        for name, text in (("sources.list", "\n".join(lines)), ("apt.conf", "\n".join(f'{key} "{value}";' for key, value in settings.items()))):
            with open(os.path.join(self.apt, name), "w", encoding="utf-8") as file:
                file.write(text + "\n")
        # A suite that has gone from the archive is no error as long as another has the kernel.
        with contextlib.suppress(LabError):
            self.ask("apt-get", "-qq", "update")

    def fetch(self, word):
        self.update()
        names = self.ask("apt-cache", "search", "--names-only", r"^linux-image-[0-9].*-cloud-amd64$").splitlines()
        releases = [name.split()[0].removeprefix("linux-image-") for name in names]
        releases = [release for release in releases if begins(release, word)]
        if not releases:
            raise LabError(f"Debian's archive has no cloud kernel {word} now (asked: {', '.join(SUITES)})")
        release = max(releases, key=version)
        image = f"linux-image-{release}"
        shown = self.ask("apt-cache", "show", "--no-all-versions", image)
        exact = re.search(r"^Version: (\S+)$", shown, re.M)[1]
        # Since 7.x the image is a name for several packages of the same version.
        depends = (re.search(r"^Depends: (.*)$", shown, re.M) or ["", ""])[1]
        parts = [image] + re.findall(rf"(linux-\S+-{re.escape(release)}) \(= {re.escape(exact)}\)", depends)
        tell(f"Fetching Linux {release} ({exact})")
        os.makedirs(self.dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making.", dir=self.dir) as making:
            debs, tree, made = (os.path.join(making, name) for name in ("debs", "tree", "made"))
            for path in (debs, tree, os.path.join(made, "lib")):
                os.makedirs(path)
            run(["apt-get", "-qq", "download"] + [f"{part}={exact}" for part in parts], cwd=debs,
                env={**os.environ, "APT_CONFIG": os.path.join(self.apt, "apt.conf")})
            for deb in os.listdir(debs):
                run([tool("dpkg-deb"), "-x", os.path.join(debs, deb), tree])
            modules = next((path for path in (os.path.join(tree, "usr/lib/modules", release), os.path.join(tree, "lib/modules", release))
                            if os.path.isdir(path)), None)
            images = (os.path.join(tree, "boot", f"vmlinuz-{release}"), os.path.join(modules or tree, "vmlinuz"))
            vmlinuz = next((path for path in images if os.path.exists(path)), None)
            if not modules or not vmlinuz:
                raise LabError(f"the packages {', '.join(parts)} hold no kernel or no modules where they are expected")
            shutil.move(vmlinuz, os.path.join(made, "vmlinuz"))
            shutil.move(modules, os.path.join(made, "lib/modules", release))
            run([tool("depmod"), "-b", made, release])
            with open(os.path.join(made, "package"), "w", encoding="utf-8") as file:
                file.write(f"{exact}\n")
            final = os.path.join(self.dir, release)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(made, final)
        return final


# ---- the root file system -----------------------------------------------------------------------------------------------

INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/guest/applets HOME=/root LC_ALL=C.UTF-8
/bin/busybox mkdir -p /guest/applets /run /tmp
/bin/busybox --install -s /guest/applets
mount -t proc proc /proc
mount -t sysfs sysfs /sys
[ -c /dev/null ] || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
hostname guest
ulimit -l unlimited; ulimit -n 65536
for module in {modules}; do modprobe $module || echo "guest: no module $module"; done
stty -F /dev/ttyS1 raw -echo
cd /root
# Through a pipe: programs that see a terminal paint progress over the results.
{{
    echo {nonce} up
    sh /guest/script
    echo {nonce} end $?
}} </dev/null 2>&1 | cat >/dev/ttyS1
sleep 1
poweroff -f
"""


def libraries(program):
    """What the dynamic loader would load for a program: paths."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return []  # a static program or a script
    if "not found" in done.stdout:
        raise LabError(f"{program} lacks a library: {done.stdout.split('not found', 1)[0].splitlines()[-1].strip()}")
    return re.findall(r"(/\S+) \(0x", done.stdout)


def put(source, root, target):
    """Copies a file with its permissions, links followed, to where it lies in a file system with merged /usr."""
    target = re.sub(r"^/(bin|sbin|lib|lib64)/", r"/usr/\1/", target)
    path = root + target
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copyfile(source, path)
        # No set-user-ID: without root here its owner is somebody who may do nothing there, and root there needs none.
        os.chmod(path, os.stat(source).st_mode & 0o777 | 0o400)


def make_root(directory, kernel, files, script, nonce):
    """An ext4 image with this machine's own programs, so that test binaries made here find the libraries they were linked with."""
    root = os.path.join(directory, "root")
    for path in ("proc", "sys", "dev", "run", "tmp", "root", "guest", "var/tmp", "etc", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        os.makedirs(os.path.join(root, path))
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", os.path.join(root, name))
    programs = [tool(name) for name in NEEDED] + [path for path in map(tool, WELCOME) if path]
    wanted = {path: path for path in programs}
    wanted.update({path: f"/guest/{os.path.basename(path)}" for path in files})
    # Where cargo told the tests, when it built them, to find this project's program and a place for their files.
    wanted.update({path: path for path in files if os.path.basename(path) == PROGRAM})
    os.makedirs(root + os.path.join(REPO, "target/tmp"))
    for source, target in list(wanted.items()):
        put(source, root, target)
        for library in libraries(source):
            put(library, root, library)
    release = os.path.basename(kernel)
    os.makedirs(os.path.join(root, "usr/lib/modules"), exist_ok=True)
    shutil.copytree(os.path.join(kernel, "lib/modules", release), os.path.join(root, "usr/lib/modules", release), symlinks=True,
                    ignore=shutil.ignore_patterns("build", "source", "sound", "media", "gpu", "System.map"))
    with open(os.path.join(root, "etc/mtab"), "w", encoding="ascii"):
        pass
    for name, text in (("init", INIT.format(modules=" ".join(MODULES), nonce=nonce)), ("script", script)):
        with open(os.path.join(root, "guest", name), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(file.name, 0o755)
    image = os.path.join(directory, "root.ext4")
    # Sparse, and without a journal: it lives for one boot. The tests want room for images, not for history.
    run([tool("mke2fs"), "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", root, image, "12G"])
    shutil.rmtree(root)
    return image


# ---- one boot -----------------------------------------------------------------------------------------------------------


def die_with_parent():
    """In the child: SIGKILL when this process ends in whatever way (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def held(path):
    """Whether a living process holds the directory of a boot."""
    try:
        with open(os.path.join(path, "lock"), "r", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def scratch(lab_dir):
    """A directory for one boot. A lock in it lives as long as this process; directories that nobody holds are leftovers."""
    base = os.path.join(lab_dir, "boots")
    os.makedirs(base, exist_ok=True)
    with open(os.path.join(lab_dir, ".lock"), "w", encoding="ascii") as turn:
        # Between a directory's birth and its lock nobody may take it for a leftover.
        fcntl.flock(turn, fcntl.LOCK_EX)
        for name in os.listdir(base):
            if not held(os.path.join(base, name)):
                shutil.rmtree(os.path.join(base, name), ignore_errors=True)
        directory = tempfile.mkdtemp(prefix="boot.", dir=base)
        lock = open(os.path.join(directory, "lock"), "w", encoding="ascii")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.close()


class Ended:
    """How a boot ended: the script's exit code or None, whether time ran out, whether the script began, the kernel's messages, seconds."""

    def __init__(self, code, over, up, console, seconds, boot_seconds):
        self.code, self.over, self.up, self.console, self.seconds, self.boot_seconds = code, over, up, console, seconds, boot_seconds

    def why(self, minutes):
        """For an end without an exit code."""
        if not self.up:
            return f"did not come up, {BOOTS} times"
        return f"took longer than {minutes:g} minutes and was ended" if self.over else "ended by itself before its script did"


def boot(lab_dir, kernel, files, script, minutes, cores, on_line):
    """Boots `kernel`, runs `script` in it, hands every line of its output to `on_line`; the guest is gone afterwards."""
    for turn in range(BOOTS):
        ended = boot_once(lab_dir, kernel, files, script, minutes, cores, on_line)
        if ended.up:
            break
        tell("\n".join(["---- the guest's console"] + ended.console.splitlines()[-20:]))
        tell(f"guest: {os.path.basename(kernel)} did not come up in {ended.seconds:.0f} s (attempt {turn + 1} of {BOOTS})")
    return ended


def boot_once(lab_dir, kernel, files, script, minutes, cores, on_line):
    nonce = f"guest-{secrets.token_hex(8)}"
    with scratch(lab_dir) as directory:
        image = make_root(directory, kernel, files, script, nonce)
        log = os.path.join(directory, "console")
        argv = [tool("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", str(cores), "-m", "3G",
                "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
                "-serial", f"file:{log}", "-serial", "stdio", "-kernel", os.path.join(kernel, "vmlinuz"),
                "-drive", f"file={image},format=raw,if=none,id=root,cache=unsafe,discard=unmap", "-device", "nvme,drive=root,serial=root",
                "-append", "console=ttyS0 panic=-1 mitigations=off apparmor=0 root=/dev/nvme0n1 rootfstype=ext4 rw rootwait init=/guest/init"]
        began, up, code = time.monotonic(), None, None
        done, over = threading.Event(), threading.Event()
        qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                preexec_fn=die_with_parent)

        def watch():
            """Ends a guest that is not up in time, and any when its time is over."""
            if not done.wait(min(UP_SECONDS, minutes * 60)) and (up is None or not done.wait(max(0, began + minutes * 60 - time.monotonic()))):
                over.set()
                qemu.kill()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for raw in qemu.stdout:
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                if line == nonce + " up":
                    up = time.monotonic()
                elif nonce + " end " in line:
                    code = int(line.rsplit(" ", 1)[1])
                    break
                else:
                    on_line(line)
        finally:
            done.set()
            watcher.join()
            qemu.kill()
            qemu.stdout.close()
            qemu.wait()
        console = ""
        with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
            console = file.read()
        now = time.monotonic()
        return Ended(code, over.is_set(), up is not None, console, now - began, (up or now) - began)


# ---- tests --------------------------------------------------------------------------------------------------------------


def build(names, release):
    """Builds test files of tests/ and gives {name: path of the binary}, and the path of this project's program."""
    argv = ["cargo", "test", "--locked", "--no-run", "--message-format=json"] + (["--release"] if release else [])
    done = subprocess.run(argv + [word for name in names for word in ("--test", name)], cwd=REPO, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{', '.join(names)} could not be built: the compiler's words are above")
    found = {}
    for line in done.stdout.splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        target = message.get("target", {})
        if message.get("executable") and ("test" in target["kind"] or target["name"] == PROGRAM):
            found[target["name"]] = message["executable"]
    missing = [name for name in (*names, PROGRAM) if name not in found]
    if missing:
        raise LabError(f"cargo made no binary of {', '.join(missing)}: is there a tests/{missing[0]}.rs?")
    return {name: found[name] for name in names}, found[PROGRAM]


def choose(name, binary, only, skip):
    """The tests of one binary: those to run, and {left out: why}."""
    known = [line.removesuffix(": test") for line in run([binary, "--list", "--format", "terse"]).splitlines() if line.endswith(": test")]
    if not known:
        raise LabError(f"{name} holds no test")
    chosen, left = [], {}
    for test in known:
        if only and not any(word in test for word in only):
            left[test] = "not asked for"
        elif any(word in test for word in skip):
            left[test] = "asked to skip"
        elif not only and (name, test) in LEFT_OUT:
            left[test] = LEFT_OUT[name, test]
        else:
            chosen.append(test)
    return chosen, left


class Row:
    """What one binary did on one kernel."""

    def __init__(self, kernel, name, chosen, left):
        self.kernel, self.name, self.chosen, self.left = kernel, name, chosen, left
        self.passed, self.failed, self.seconds, self.code = [], [], 0.0, None

    @property
    def unfinished(self):
        return [test for test in self.chosen if test not in self.passed and test not in self.failed]


def run_tests(lab_dir, kernel, binaries, program, choices, minutes, cores, console):
    """One boot; every binary's chosen tests, one at a time. Gives the rows."""
    release = os.path.basename(kernel)
    rows = {name: Row(release, name, *choices[name]) for name in binaries}
    mark = f"binary-{secrets.token_hex(4)}"
    script = ["failed=0"]
    for name, binary in binaries.items():
        if rows[name].chosen:
            words = [f"/guest/{os.path.basename(binary)}", "--include-ignored", "--test-threads=1", "--exact"] + rows[name].chosen
            script += [f"echo {mark} begin {name}", shlex.join(words), "code=$?", "[ $code = 0 ] || failed=1", f"echo {mark} end {name} $code"]
    script += ["exit $failed"]
    at, test = {"row": None, "began": 0.0}, {"name": None, "began": 0.0}

    def line(text):
        words = text.split(" ")
        if words[0] == mark and words[1] == "begin":
            at["row"], at["began"] = rows[words[2]], time.monotonic()
            test["began"] = at["began"]
            print(f"---- {release}: {words[2]}", flush=True)
            return
        if words[0] == mark and words[1] == "end":
            row = rows[words[2]]
            row.code, row.seconds = int(words[3]), time.monotonic() - at["began"]
            at["row"] = None
            return
        found, row = TEST_LINE.match(text), at["row"]
        if found and row:
            (row.passed if found[2] == "ok" else row.failed).append(found[1])
            now = time.monotonic()
            text += f"  ({now - test['began']:.1f} s)"
            test["began"] = now
        print(text, flush=True)

    ended = boot(lab_dir, kernel, [*binaries.values(), program], "\n".join(script) + "\n", minutes, cores, line)
    if at["row"]:
        at["row"].seconds = time.monotonic() - at["began"]
    if ended.code is None:
        print(f"guest: {release} {ended.why(minutes)}", flush=True)
    if console or (ended.code is None and ended.up):
        print("\n".join(["---- the guest's console"] + ended.console.splitlines()[-2000 if console else -40:]), flush=True)
    return list(rows.values()), ended


def table(rows):
    lines = [f"{'kernel':<28} {'tests':<16} {'passed':>6} {'failed':>6} {'hung':>5} {'left out':>8} {'seconds':>8}"]
    for row in rows:
        lines.append(f"{row.kernel:<28} {row.name:<16} {len(row.passed):6} {len(row.failed):6} {len(row.unfinished):5} {len(row.left):8} {row.seconds:8.1f}")
        lines += [f"    failed: {test}" for test in row.failed]
        lines += [f"    not finished: {test}" for test in row.unfinished]
        lines += [f"    left out: {test} ({why})" for test, why in row.left.items() if why != "not asked for"]
        if row.code not in (0, None) and not row.failed and not row.unfinished:
            lines.append(f"    {row.name} ended with {row.code} although no test failed")
    return "\n".join(lines)


def figures(rows):
    """For the JSON: one object per row."""
    return [{"kernel": row.kernel, "tests": row.name, "passed": len(row.passed), "failed": len(row.failed), "unfinished": len(row.unfinished),
             "left_out": sorted(row.left), "seconds": round(row.seconds, 1), "failures": row.failed + row.unfinished} for row in rows]


def bad(row):
    """How many of a row's tests did not pass; a binary that ended badly without a failed test counts as one."""
    count = len(row.failed) + len(row.unfinished)
    return count or int(bool(row.chosen) and row.code != 0)


def directory():
    """The guests' part of the lab's directory."""
    if os.uname().machine != "x86_64":
        raise LabError(f"guests are x86-64 kernels and this machine is {os.uname().machine}: nothing was run")
    base = Lab().dir
    marker = os.path.join(base, ".doublure-lab")
    if os.path.isdir(base) and os.listdir(base) and not os.path.exists(marker):
        raise LabError(f"{base} holds files that are not the lab's: name an empty or new directory in DOUBLURE_LAB")
    path = os.path.join(base, "guests")
    try:
        os.makedirs(path, exist_ok=True)
        with open(marker, "a", encoding="utf-8"):
            pass
        os.close(os.open(os.path.join(path, ".lock"), os.O_CREAT | os.O_WRONLY, 0o644))
    except OSError as error:
        raise LabError(f"{path} cannot be written ({error.strerror}): run it as root or name another directory in DOUBLURE_LAB") from None
    return path


def lane(kernels, tests=DEFAULT, only=(), skip=(), release=False, minutes=20, cores=2, fresh=False, console=False):
    """The tests on every kernel, one guest at a time. Gives the rows."""
    lab_dir, rows = directory(), []
    found = Kernels(lab_dir)
    binaries, program = build(list(tests), release)
    choices = {name: choose(name, binary, only, skip) for name, binary in binaries.items()}
    if not any(chosen for chosen, _ in choices.values()):
        raise LabError(f"no test of {', '.join(tests)} is left to run: see --only and --skip")
    for word in kernels:
        kernel = found.get(word, fresh)
        made, ended = run_tests(lab_dir, kernel, binaries, program, choices, minutes, cores, console)
        print(f"---- {os.path.basename(kernel)}: up after {ended.boot_seconds:.1f} s, {ended.seconds:.1f} s in all", flush=True)
        rows += made
    return rows


def command(word, argv, files, minutes, cores, fresh, console):
    """A command in a guest; its exit code, 124 when time ran out."""
    lab_dir = directory()
    kernel = Kernels(lab_dir).get(word, fresh)
    ended = boot(lab_dir, kernel, files, shlex.join(argv) + "\n", minutes, cores, lambda line: print(line, flush=True))
    if console or (ended.code is None and ended.up):
        tell(ended.console if console else "\n".join(ended.console.splitlines()[-40:]))
    if ended.code is None:
        tell(f"guest: {os.path.basename(kernel)} " + ended.why(minutes))
        return 124 if ended.over else 125
    tell(f"guest: {os.path.basename(kernel)}: up after {ended.boot_seconds:.1f} s, {ended.seconds:.1f} s in all")
    return ended.code


def parse(words):
    """The options; LabError for what is none."""
    given = {"tests": [], "only": [], "skip": [], "with": [], "minutes": 20.0, "cores": 2, "release": False, "fresh": False, "console": False,
             "kernels": [], "command": None}
    words = list(words)
    if "--" in words:
        given["command"] = words[words.index("--") + 1:]
        del words[words.index("--"):]
        if not given["command"]:
            raise LabError("no command after --")
    lists = {"--test": "tests", "--only": "only", "--skip": "skip", "--with": "with"}
    while words:
        word = words.pop(0)
        if word in ("--release", "--fresh", "--console"):
            given[word[2:]] = True
        elif word in lists or word in ("--minutes", "--cores"):
            if not words:
                raise LabError(f"{word} wants a value")
            value = words.pop(0)
            if word in lists:
                given[lists[word]].append(value)
                continue
            try:
                given[word[2:]] = float(value) if word == "--minutes" else int(value)
            except ValueError:
                raise LabError(f"{word} wants a number, not {value}") from None
        elif word.startswith("-"):
            raise LabError(f"there is no option {word}: see ./dev lab guest --help")
        else:
            given["kernels"].append(word)
    if not 0 < given["minutes"] <= 180 or not 1 <= given["cores"] <= 16:
        raise LabError("--minutes is between 0 and 180, --cores between 1 and 16")
    return given


def main():
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if words else 2

    def stop(number, _frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    given = parse([word for word in words if word != "--list"])
    tests = tuple(given["tests"]) or DEFAULT
    if "--list" in words:
        for name, binary in build(list(tests), given["release"])[0].items():
            chosen, left = choose(name, binary, given["only"], given["skip"])
            print("\n".join([f"{name}: {test}" for test in chosen] + [f"{name}: {test} is left out: {why}" for test, why in left.items()]))
        return 0
    if len(given["kernels"]) != 1:
        raise LabError("name one kernel: ./dev lab guest 6.1")
    for file in given["with"]:
        if not os.path.isfile(file):
            raise LabError(f"{file} is no file")
    if given["command"]:
        files = [os.path.realpath(file) for file in given["with"]]
        if given["tests"]:
            binaries, program = build(given["tests"], given["release"])
            files += [*binaries.values(), program]
        return command(given["kernels"][0], given["command"], files, given["minutes"], given["cores"], given["fresh"], given["console"])
    rows = lane(given["kernels"], tests, given["only"], given["skip"], given["release"], given["minutes"], given["cores"], given["fresh"],
                given["console"])
    print(table(rows))
    passed, failed = sum(len(row.passed) for row in rows), sum(map(bad, rows))
    report.give_back(REPO)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        tell(f"guest: {error}")
        sys.exit(2)
    except KeyboardInterrupt as error:
        tell(f"guest: stopped by {str(error) or 'Ctrl-C'}; the guest and its disk are gone")
        sys.exit(130)
