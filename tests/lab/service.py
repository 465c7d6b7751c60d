"""The database of the demo: its image, its container, the client that remembers acknowledgements, and the comparison."""
import json
import os
import signal
import subprocess

from lab import HERE, HOSTS, LabError, wait_for

PORT = 5432
IMAGE = "postgres:lab"
CONTAINER = "pg"
VOLUME = "pgdata"
MOUNT = "/var/lib/postgresql/data"
CLIENT = os.path.join(HERE, "pgclient.py")
CHANGES = [
    'ENTRYPOINT ["/usr/local/bin/pg-entry"]',
    f"ENV PGDATA={MOUNT}/pgdata PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    f"EXPOSE {PORT}",
    'HEALTHCHECK --interval=1s --timeout=5s --retries=60 CMD ["/usr/local/bin/pg_isready","-q","-h","/tmp","-U","postgres"]',
]


def build_image(lab):
    """The image's tarball, made from Debian packages or found in the cache."""
    # The caller's environment goes along: it may hold a proxy.
    builder = lab.start("image", [os.path.join(HERE, "image.sh"), lab.path("cache")], stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    try:
        out, err = builder.communicate(timeout=600)
    except BaseException:
        # Its whole group: mmdebstrap is a child of a child.
        os.killpg(builder.pid, signal.SIGKILL)
        builder.wait()
        raise
    finally:
        lab.record("image", None)
    if builder.returncode != 0:
        raise LabError((err.strip().splitlines() or ["the image could not be built"])[-1])
    return out.strip()


def import_image(lab, host, tarball):
    argv = ["docker", "import"]
    for change in CHANGES:
        argv += ["--change", change]
    lab.exec(host, argv + [tarball, IMAGE])


def run_container(lab, host, volume=VOLUME):
    lab.exec(host, ["docker", "run", "--detach", "--name", CONTAINER, "--stop-signal", "SIGINT", "--publish", f"{PORT}:{PORT}",
                    "--volume", f"{volume}:{MOUNT}", IMAGE])


def await_answer(lab, host, seconds):
    """Waits until PostgreSQL answers a query from the wire; gives the monotonic time at which it did."""
    return float(lab.exec("wire", client("await", host, str(seconds)), timeout=seconds + 10).stdout)


def client(verb, host, last):
    return ["/usr/bin/python3", "-B", CLIENT, verb, HOSTS[host][0], str(PORT), last]


def query(lab, host, sql):
    text = lab.exec("wire", client("query", host, sql)).stdout
    return [line.split("\t") for line in text.splitlines()]


class Writer:
    """The client that inserts numbered rows. It lives in the wire's network and in the machine's pid namespace: no host's power
    cut can take what it knows."""

    def __init__(self, lab, host):
        self.lab = lab
        self.log = os.path.join(lab.run, "acknowledged.log")
        # `nsenter --net` alone does not fork: this process becomes the client itself.
        self.process = lab.start("writer", lab.enter("wire") + client("write", host, self.log), stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)

    def rows(self):
        """Acknowledged rows so far."""
        try:
            with open(self.log, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 200))
                lines = file.read().split(b"\n")[:-1]
            return int(lines[-1].split()[0]) if lines else 0
        except (OSError, ValueError, IndexError):
            return 0

    def await_rows(self, count, seconds=60):
        def enough():
            if self.process.poll() is not None:
                raise LabError(f"the client ended early: {self.process.stderr.read().strip() or 'no word'}")
            return self.rows() >= count

        wait_for(f"{count} acknowledged rows", seconds, enough)

    def stop(self):
        """Ends it; gives (its own account, [(row, wall-clock seconds of its acknowledgement)])."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            out, err = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise LabError("the client did not end within 30 s") from None
        finally:
            self.lab.record("writer", None)
        if self.process.returncode != 0:
            raise LabError(f"the client failed: {err.strip()}")
        with open(self.log, encoding="ascii") as file:
            rows = [(int(line.split()[0]), float(line.split()[1])) for line in file]
        account = json.loads(out)
        if [n for n, _ in rows] != list(range(1, account["acknowledged"] + 1)):
            raise LabError("the client's log is not what it says it acknowledged: do not trust this run")
        return account, rows


def found(lab, host, sent):
    """What the database holds: {count, lowest, highest, damaged, missing}, `missing` being those of 1..=sent that are not there."""
    (row,) = query(lab, host, "SELECT count(*), coalesce(min(n), 0), coalesce(max(n), 0), count(*) FILTER "
                              "(WHERE payload IS DISTINCT FROM repeat(md5(n::text), 16)) FROM ledger")
    count, lowest, highest, damaged = map(int, row)
    missing = {int(r[0]) for r in query(lab, host, f"SELECT generate_series(1, {sent}) EXCEPT SELECT n FROM ledger")}
    return {"count": count, "lowest": lowest, "highest": highest, "damaged": damaged, "missing": missing}


def compare(acknowledged, sent, held, cut_at, safe_until):
    """What was promised against what was found. Times are wall-clock seconds of the one machine that both hosts run on.

    `acknowledged` [(row, time)], `held` as `found` gives it, `safe_until` the latest moment that any host had reported as
    recoverable (None: nothing was). A row acknowledged at or before that moment was on the primary's disk before the cut's
    beginning, so it must be there."""
    missing = held["missing"]
    tail = set(range(held["highest"] + 1, sent + 1))
    lost = [(row, at) for row, at in acknowledged if row in missing]
    return {
        "rows_acknowledged": len(acknowledged),
        "rows_present": held["count"],
        "rows_lost": len(lost),
        "rows_gapless": held["count"] == held["highest"] <= sent and missing == tail and held["damaged"] == 0
        and (held["count"] == 0 or held["lowest"] == 1),
        "rows_damaged": held["damaged"],
        "rows_reported_safe_but_lost": sum(1 for _, at in lost if safe_until is not None and at <= safe_until),
        "rpo_found_ms": round(max(0.0, cut_at - min(at for _, at in lost)) * 1000, 1) if lost else 0.0,
    }


def amcheck(lab, host):
    """pg_amcheck over every database, heap against index: its complaints, empty when clean."""
    done = lab.exec(host, ["docker", "exec", CONTAINER, "pg_amcheck", "--host=/tmp", "--username=postgres", "--all",
                           "--install-missing", "--heapallindexed", "--parent-check"], check=False, timeout=300)
    words = (done.stdout + done.stderr).strip()
    return "" if done.returncode == 0 and not words else words or f"pg_amcheck ended with {done.returncode}"
