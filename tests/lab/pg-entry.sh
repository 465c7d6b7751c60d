#!/bin/sh
# The database container's first process: makes the cluster on the volume once, then becomes PostgreSQL.
# It runs as root only to give the volume's directory to `postgres`; everything after is that user's.
set -eu

bin=$(echo /usr/lib/postgresql/*/bin)
PGDATA=${PGDATA:-/var/lib/postgresql/data/pgdata}
export PGDATA LC_ALL=C.UTF-8

as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }

# PGDATA is a subdirectory: the root of a fresh file system holds lost+found, and initdb wants an empty directory.
# initdb works in a side directory that is renamed when it is whole, so that a stop in the middle leaves nothing half made.
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    making=$PGDATA.making
    rm -rf "$making" "$PGDATA"
    install -d -o postgres -g postgres -m 0700 "$making"
    as_postgres "$bin/initdb" -D "$making" -U postgres --data-checksums --encoding=UTF8 --auth=reject >/dev/null
    # Trust, but only for the lab's own addresses: the container's bridge and the wire between the two hosts.
    cat >"$making/pg_hba.conf" <<'HBA'
local all all trust
host  all all 172.30.0.0/16 trust
host  all all 10.77.0.0/24  trust
HBA
    cat >>"$making/postgresql.conf" <<'CONF'
listen_addresses = '*'
unix_socket_directories = '/tmp'
# What the demo is about: an acknowledged commit is on the disk. These are the defaults, written down.
fsync = on
synchronous_commit = on
full_page_writes = on
CONF
    chown postgres:postgres "$making/pg_hba.conf" "$making/postgresql.conf"
    sync "$making/pg_hba.conf" "$making/postgresql.conf"
    mv "$making" "$PGDATA"
    sync "$(dirname "$PGDATA")"
fi

# A power cut leaves the old process number behind. It is stale: this container has just begun and holds the volume alone.
rm -f "$PGDATA/postmaster.pid"
cd "$PGDATA"
exec setpriv --reuid=postgres --regid=postgres --init-groups "$bin/postgres" -D "$PGDATA"
