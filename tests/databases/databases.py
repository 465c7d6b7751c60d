#!/usr/bin/env python3
"""PostgreSQL and SQLite on two volumes, for tests/root_databases.rs: a load that remembers what was acknowledged, and what a copy holds.

    databases.py root DIR                      unpacks the lab's database image (built if it is not cached) into DIR
    databases.py load ROOT A B ACKS SEED       mounts the devices A (ext4) and B (XFS), makes the databases, prints `ready`, writes
                                               until its input ends, leaves all clean; ACKS gets `WRITER N SENT ACKNOWLEDGED`
    databases.py state ROOT A B SAMPLED        mounts the images, starts the databases and prints what they hold, as JSON
    databases.py same ROOT A B COPY_A COPY_B   mounts all four to be read, and prints what is not the same in their files, as JSON

All but `root` run as the first process of mount, pid, IPC and network namespaces of their own: whatever they start or mount goes
with them. Times are CLOCK_MONOTONIC in nanoseconds. `state` repairs nothing and gives no program an option that would.

PostgreSQL: PGDATA on A, its WAL on B. Each transaction of a writer is a numbered row and a transfer between two accounts.
SQLite, all in WAL mode: `first` on A and `second` on B, where row N of `second` is begun after row N of `first` was acknowledged;
`wide` on B with larger transactions. Each transaction is a numbered row, and some pages that are written over.
"""
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lab"))
import pgclient
import service
from lab import Lab, LabError

WRITERS = 4
ACCOUNTS = 40_000
# Rows so wide now and then that they stand in a table beside, uncompressed.
PAYLOAD = "repeat(md5({writer} || ':' || {n}), (CASE WHEN {n} % 60 = 0 THEN 300 ELSE 1 + {n} % 7 END)::int)"
TABLES = f"""
CREATE TABLE ledger (writer int, n bigint, payload text NOT NULL, PRIMARY KEY (writer, n));
ALTER TABLE ledger ALTER payload SET STORAGE EXTERNAL;
CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL, touched bigint NOT NULL, filler text NOT NULL);
INSERT INTO accounts SELECT i, 0, 0, repeat('x', 150) FROM generate_series(1, {ACCOUNTS}) i;
CREATE TABLE churn_0 AS SELECT 0 AS i;
"""
# What the cluster keeps about itself. A small cache and a small log: pages are evicted, rewritten and checkpointed all the time.
CONF = """
listen_addresses = ''
unix_socket_directories = '/run'
fsync = on
synchronous_commit = on
full_page_writes = on
recovery_init_sync_method = syncfs
shared_buffers = 8MB
max_connections = 20
max_wal_size = 64MB
min_wal_size = 32MB
checkpoint_timeout = 30s
autovacuum_naptime = 5s
"""
SQLITE = {"first": "a", "second": "b", "wide": "b"}
SQLITE_PAGES = 1500
START_SECONDS = 180
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {(done.stderr.strip() or done.stdout.strip() or str(done.returncode)).splitlines()[-1]}")
    return done.stdout


def unpack(directory):
    lab, end = Lab(), time.monotonic() + 600
    while True:
        try:
            lab.claim()
            break
        except LabError:
            # Somebody else's lab may be up: the image is looked for when that one is done.
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    os.makedirs(lab.path("cache"), exist_ok=True)
    run("tar", "--extract", "--numeric-owner", "--file", service.build_image(lab), "--directory", directory)


# ---- a world of its own ---------------------------------------------------------------------------------------------------

def world(root):
    """What PostgreSQL needs in its root; and nobody else's volumes, which would stay busy for as long as this lives."""
    run("mount", "--make-rprivate", "/")
    own = os.path.dirname(os.path.realpath(root))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        mounts = [(line.split(" - ")[1].split(" ")[1], line.split(" ")[4]) for line in table]
    for source, point in reversed(mounts):
        if source.startswith("/dev/loop") and not point.startswith(own + "/"):
            subprocess.run(["umount", "--lazy", point], stderr=subprocess.DEVNULL)
    for part in ("dev", "run"):
        run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", f"{root}/{part}")
    os.makedirs(f"{root}/dev/shm")
    for path in ("dev/shm", "run"):
        os.chmod(f"{root}/{path}", 0o1777)
    for name, minor in (("null", 3), ("zero", 5), ("random", 8), ("urandom", 9)):
        os.mknod(f"{root}/dev/{name}", 0o20666, os.makedev(1, minor))
        os.chmod(f"{root}/dev/{name}", 0o666)
    for volume in "ab":
        os.makedirs(f"{root}/vol/{volume}", exist_ok=True)


def in_root(root, *argv):
    return ["/usr/sbin/chroot", root, "setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *argv]


def program(root, name):
    (version,) = os.listdir(f"{root}/usr/lib/postgresql")
    return f"/usr/lib/postgresql/{version}/bin/{name}"


def start(root, log):
    with open(log, "ab") as out:
        return subprocess.Popen(in_root(root, program(root, "postgres"), "-D", "/vol/a/pgdata"), stdin=subprocess.DEVNULL, stdout=out,
                                stderr=out, cwd="/", env={"LC_ALL": "C.UTF-8", "PATH": PATH})


def connect(root, postmaster, seconds=START_SECONDS):
    """A connection that answers, or the reason why there will be none."""
    end, last = time.monotonic() + seconds, "nothing was tried"
    while time.monotonic() < end:
        if postmaster.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended with {postmaster.returncode}")
        try:
            connection = pgclient.Connection(f"{root}/run/.s.PGSQL.5432", 0, seconds)
            connection.query("SELECT 1")
            return connection
        except pgclient.ServerError as error:
            last = str(error)
            # Anything but "starting up" stays.
            if "(57P03)" not in last:
                raise
        except OSError as error:
            last = str(error)
        time.sleep(0.01)
    raise RuntimeError(f"PostgreSQL did not answer within {seconds} s: {last}")


def stop(postmaster, number):
    postmaster.send_signal(number)
    try:
        postmaster.wait(120)
    except subprocess.TimeoutExpired:
        postmaster.kill()
        postmaster.wait()
        raise RuntimeError("PostgreSQL did not end within 120 s") from None


# ---- the load -------------------------------------------------------------------------------------------------------------

class Load:
    """Writers, each a thread with a log of its own, until told to stop or until one of them fails."""

    def __init__(self, root, seed):
        self.root, self.seed, self.stopped = root, seed, threading.Event()
        self.acks, self.failures, self.threads = {}, [], []

    def begin(self, name, work, *arguments):
        def body():
            try:
                work(random.Random(f"{self.seed} {name}"), *arguments)
            except Exception as error:  # noqa: BLE001 - whatever it was, the test is told
                self.failures.append(f"{name}: {error}")
                self.stopped.set()

        thread = threading.Thread(target=body, name=name)
        self.threads.append(thread)
        thread.start()

    def postgres(self, dice, postmaster, writer):
        connection, log, n = connect(self.root, postmaster), self.acks.setdefault(f"pg{writer}", []), 0
        while not self.stopped.is_set():
            n += 1
            low, high = sorted(dice.sample(range(1, ACCOUNTS + 1), 2))
            amount = dice.randint(-1000, 1000)
            sent = time.monotonic_ns()
            connection.query(f"BEGIN; INSERT INTO ledger VALUES ({writer}, {n}, {PAYLOAD.format(writer=writer, n=n)}); "
                             f"UPDATE accounts SET balance = balance - {amount}, touched = touched + 1 WHERE id = {low}; "
                             f"UPDATE accounts SET balance = balance + {amount}, touched = touched + 1 WHERE id = {high}; COMMIT")
            log.append((sent, time.monotonic_ns()))

    def upheaval(self, dice, postmaster):
        """Checkpoints, changes of segment, new and old files, rewritten indices: what moves many blocks at once."""
        connection, table = connect(self.root, postmaster), 0
        while not self.stopped.wait(dice.uniform(0.2, 1.5)):
            what = dice.choice(("CHECKPOINT", "CHECKPOINT", "SELECT pg_switch_wal()", "VACUUM accounts", "REINDEX INDEX accounts_pkey", "churn"))
            if what == "churn":
                connection.query(f"CREATE TABLE churn_{table + 1} AS SELECT i, md5(i::text) FROM generate_series(1, 20000) i; "
                                 f"DROP TABLE churn_{table}")
                table += 1
            else:
                connection.query(what)

    def sqlite(self, name):
        volume = SQLITE[name]
        connection = sqlite3.connect(f"{self.root}/vol/{volume}/{name}.db", isolation_level=None, timeout=60, check_same_thread=False)
        assert connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal"
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE ledger (n INTEGER PRIMARY KEY, names INTEGER NOT NULL, touches INTEGER NOT NULL, payload BLOB NOT NULL)")
        connection.execute("CREATE TABLE pages (id INTEGER PRIMARY KEY, touched INTEGER NOT NULL, filler BLOB NOT NULL)")
        connection.execute("CREATE INDEX by_filler ON pages (filler)")
        connection.execute("WITH RECURSIVE i(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM i WHERE n < ?) "
                           "INSERT INTO pages SELECT n, 0, randomblob(100) FROM i", (SQLITE_PAGES,))
        self.acks[name] = []
        return connection

    def commit(self, dice, name, connection, touches):
        """One transaction, acknowledged; gives its number."""
        log = self.acks[name]
        n = len(log) + 1
        sent = time.monotonic_ns()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?)", (n, n, touches, payload(n)))
        ids = [(dice.randbytes(100), id) for id in dice.sample(range(1, SQLITE_PAGES + 1), touches)]
        connection.executemany("UPDATE pages SET touched = touched + 1, filler = ? WHERE id = ?", ids)
        connection.execute("COMMIT")
        log.append((sent, time.monotonic_ns()))
        if dice.random() < 0.03:
            connection.execute(f"PRAGMA wal_checkpoint({dice.choice(('PASSIVE', 'RESTART', 'TRUNCATE'))})").fetchone()
        return n

    def chain(self, dice, first, second):
        while not self.stopped.is_set():
            self.commit(dice, "first", first, 2)
            self.commit(dice, "second", second, 2)

    def wide(self, dice, connection):
        while not self.stopped.is_set():
            self.commit(dice, "wide", connection, 1 + dice.randrange(60))


def payload(n):
    return (b"%d:" % n) * (200 if n % 40 == 0 else 1 + n % 9)


def load(root, first, second, acks, seed):
    world(root)
    run("mount", "-t", "ext4", first, f"{root}/vol/a")
    run("mount", "-t", "xfs", second, f"{root}/vol/b")
    for volume, name in (("a", "pgdata"), ("b", "pg_wal")):
        os.mkdir(f"{root}/vol/{volume}/{name}", 0o700)
        run("/usr/sbin/chroot", root, "chown", "postgres:postgres", f"/vol/{volume}/{name}")
    run(*in_root(root, program(root, "initdb"), "-D", "/vol/a/pgdata", "--waldir=/vol/b/pg_wal", "-U", "postgres", "--data-checksums",
                 "--encoding=UTF8", "--locale=C.UTF-8", "--auth=trust", "--no-sync"))
    with open(f"{root}/vol/a/pgdata/postgresql.conf", "a", encoding="ascii") as conf:
        conf.write(CONF)
    work = Load(root, seed)
    postmaster = start(root, acks + ".server")
    try:
        connection = connect(root, postmaster)
        connection.query(TABLES)
        connection.close()
        sqlites = {name: work.sqlite(name) for name in SQLITE}
        # initdb left its files to this.
        for volume in "ab":
            run("sync", "--file-system", f"{root}/vol/{volume}")
        print("ready", flush=True)
        for writer in range(WRITERS):
            work.begin(f"writer {writer}", work.postgres, postmaster, writer)
        work.begin("upheaval", work.upheaval, postmaster)
        work.begin("chain", work.chain, sqlites["first"], sqlites["second"])
        work.begin("wide", work.wide, sqlites["wide"])
        threading.Thread(target=lambda: (os.read(0, 1), work.stopped.set()), daemon=True).start()
        work.stopped.wait()
    finally:
        work.stopped.set()
        for thread in work.threads:
            thread.join()
        if postmaster.poll() is None:
            stop(postmaster, signal.SIGINT)
    for connection in sqlites.values():
        connection.close()
    for volume in "ab":
        run("umount", f"{root}/vol/{volume}")
    with open(acks, "w", encoding="ascii") as out:
        for name, log in work.acks.items():
            out.writelines(f"{name} {n} {sent} {acknowledged}\n" for n, (sent, acknowledged) in enumerate(log, 1))
    print(json.dumps({"failures": work.failures}), flush=True)


# ---- what a state holds ---------------------------------------------------------------------------------------------------

class State:
    """What was found, and what is wrong about it."""

    def __init__(self):
        self.wrong, self.rows, self.recovery_ms = [], {}, None

    @contextlib.contextmanager
    def step(self, what):
        """A failure here is the state's."""
        try:
            yield
        # A damaged database may answer anything, also what is no number.
        except (RuntimeError, OSError, ValueError, TypeError, pgclient.ServerError, sqlite3.Error) as error:
            self.wrong.append(f"{what}: {error}")

    def gapless(self, name, count, lowest, highest, damaged):
        self.rows[name] = highest
        if count != highest or (count and lowest != 1):
            self.wrong.append(f"{name}: {count} rows from {lowest} to {highest}: there are gaps")
        if damaged:
            self.wrong.append(f"{name}: {damaged} rows hold something else than was written")

    def postgres(self, root, sampled):
        log = f"{root}/run/server.log"
        began = time.monotonic()
        postmaster = start(root, log)
        try:
            connection = connect(root, postmaster)
            self.recovery_ms = round((time.monotonic() - began) * 1000)
            found = connection.query("SELECT writer, count(*), min(n), max(n), count(*) FILTER (WHERE payload IS DISTINCT FROM "
                                        f"{PAYLOAD.format(writer='writer', n='n')}) FROM ledger GROUP BY writer")
            self.rows.update({f"pg{writer}": 0 for writer in range(WRITERS)})
            for row in found:
                writer, *numbers = map(int, row)
                self.gapless(f"pg{writer}", *numbers)
            ((accounts, balance, touched, rows),) = connection.query("SELECT count(*), sum(balance), sum(touched), (SELECT count(*) FROM ledger) FROM accounts")
            if (int(accounts), int(balance), int(touched)) != (ACCOUNTS, 0, 2 * int(rows)):
                self.wrong.append(f"half a transaction: {accounts} accounts with {balance} in all, touched {touched} times by {rows} rows")
            if sampled:
                done = subprocess.run(in_root(root, program(root, "pg_amcheck"), "--host=/run", "--username=postgres", "--all", "--install-missing",
                                              "--heapallindexed", "--parent-check"), capture_output=True, text=True, env={"LC_ALL": "C.UTF-8", "PATH": PATH})
                if done.returncode != 0 or done.stdout.strip():
                    self.wrong.append(f"pg_amcheck: {(done.stdout + done.stderr).strip()[:1000]}")
        except (RuntimeError, OSError, pgclient.ServerError) as error:
            with open(log, encoding="utf-8", errors="replace") as file:
                raise RuntimeError(f"{error}; its log ends with: {' | '.join(file.read().splitlines()[-6:])}") from None
        finally:
            if postmaster.poll() is None:
                stop(postmaster, signal.SIGQUIT)

    def sqlite(self, root, name):
        connection = sqlite3.connect(f"{root}/vol/{SQLITE[name]}/{name}.db", isolation_level=None)
        try:
            found = connection.execute("PRAGMA integrity_check").fetchall()
            if found != [("ok",)]:
                self.wrong.append(f"{name}: integrity_check says {found[:3]}")
            rows = connection.execute("SELECT n, names, payload FROM ledger ORDER BY n").fetchall()
            damaged = sum(names != n or held != payload(n) for n, names, held in rows)
            self.gapless(name, len(rows), rows[0][0] if rows else 0, rows[-1][0] if rows else 0, damaged)
            ((pages, touched, touches),) = connection.execute("SELECT count(*), sum(touched), (SELECT total(touches) FROM ledger) FROM pages")
            if (pages, touched) != (SQLITE_PAGES, touches):
                self.wrong.append(f"{name}: half a transaction: {pages} pages touched {touched} times, {touches} by the rows")
        finally:
            connection.close()


def state(root, first, second, sampled):
    world(root)
    held = State()
    mounted = []
    with held.step("mount"):
        for volume, image, kind, options in (("a", first, "ext4", "loop"), ("b", second, "xfs", "loop,nouuid")):
            run("mount", "-t", kind, "-o", options, image, f"{root}/vol/{volume}")
            mounted.append(volume)
    if mounted == ["a", "b"]:
        with held.step("PostgreSQL"):
            held.postgres(root, sampled)
        for name in SQLITE:
            with held.step(f"SQLite, {name}"):
                held.sqlite(root, name)
        if {"first", "second"} <= held.rows.keys() and held.rows["second"] > held.rows["first"]:
            held.wrong.append(f"second is ahead: it names row {held.rows['second']}, first has {held.rows['first']}")
    with held.step("unmount"):
        for volume in mounted:
            run("umount", f"{root}/vol/{volume}")
    if sampled and mounted == ["a", "b"]:
        with held.step("fsck.ext4"):
            run("fsck.ext4", "-f", "-n", first)
        with held.step("xfs_repair"):
            run("xfs_repair", "-n", second)
    print(json.dumps({"wrong": held.wrong, "rows": held.rows, "recovery_ms": held.recovery_ms}))


def same(root, first, second, first_copy, second_copy):
    """Blocks that belong to no file may differ: a page that was changed while it was written, and whose file was gone before it was
    written again. What is in a file may not."""
    world(root)
    wrong = []
    for kind, options, volume, copy in (("ext4", "ro", first, first_copy), ("xfs", "ro,nouuid", second, second_copy)):
        try:
            run("mount", "-t", kind, "-o", options, volume, f"{root}/vol/a")
            run("mount", "-t", kind, "-o", f"{options},loop", copy, f"{root}/vol/b")
        except RuntimeError as error:
            wrong.append(str(error))
            break
        done = subprocess.run(["diff", "--recursive", "--brief", "--no-dereference", f"{root}/vol/a", f"{root}/vol/b"], capture_output=True, text=True)
        wrong += (done.stdout + done.stderr).splitlines()
        for point in "ba":
            run("umount", f"{root}/vol/{point}")
        done = subprocess.run([f"fsck.{kind}", "-f", "-n", copy] if kind == "ext4" else ["xfs_repair", "-n", copy], capture_output=True, text=True)
        if done.returncode != 0:
            wrong.append(f"{copy} is damaged: {(done.stdout + done.stderr).strip()[-500:]}")
    print(json.dumps(wrong))


def main():
    os.environ["PATH"] = PATH
    verb, *arguments = sys.argv[1:] or [""]
    if verb == "root" and len(arguments) == 1:
        unpack(*arguments)
    elif verb == "load" and len(arguments) == 5:
        load(*arguments)
    elif verb == "state" and len(arguments) == 4:
        root, first, second, sampled = arguments
        state(root, first, second, sampled == "1")
    elif verb == "same" and len(arguments) == 5:
        same(*arguments)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LabError, RuntimeError, OSError) as failure:
        print(f"databases: {failure}", file=sys.stderr)
        sys.exit(1)
