#!/bin/bash
# Builds the lab's PostgreSQL image as a plain root tarball from the packages of this machine's own Debian or Ubuntu.
# Usage: image.sh CACHE_DIR      prints the tarball's path; made once per recipe, found again after that.
# No registry is asked: the image must be the same with and without one.
set -euo pipefail
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${1:?usage: image.sh CACHE_DIR}
die() { echo "image: $*" >&2; exit 1; }

# The suite and mirrors that apt uses here, so that a local mirror or proxy is honoured. Backports and third parties stay out.
sources() {
    local created uri release component origin keyring
    apt-get indextargets --format '$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)' |
    while IFS='|' read -r created uri release component origin; do
        [ "$created" = Packages ] || continue
        case $origin in
            Debian) keyring=/usr/share/keyrings/debian-archive-keyring.gpg ;;
            Ubuntu) keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg ;;
            *) continue ;;
        esac
        case $release in *-backports*|*-proposed*) continue ;; esac
        if [ -e "$keyring" ]; then keyring="[signed-by=$keyring] "; else keyring=; fi
        echo "deb $keyring$uri $release $component"
    done | sort -u
}

mkdir -p "$cache"
list=$(sources)
if [ -z "$list" ]; then
    apt-get update -q >&2 || die "apt-get update failed; the database image needs this machine's Debian or Ubuntu mirror"
    list=$(sources)
fi
[ -n "$list" ] || die "apt knows no Debian or Ubuntu archive on this machine; add one to /etc/apt/sources.list"
# The version is the archive's own default: `postgresql` is a metapackage that depends on it.
version=$(apt-cache depends postgresql 2>/dev/null | sed -n 's/^ *Depends: postgresql-\([0-9][0-9]*\)$/\1/p' | head -1)
[ -n "$version" ] || die "apt finds no package postgresql; run apt-get update"
package=postgresql-$version
candidate=$(apt-cache policy "$package" | sed -n 's/^  Candidate: //p')

key=$( { cat "$here/image.sh" "$here/pg-entry.sh"; echo "$list"; echo "$package $candidate"; dpkg --print-architecture; } |
    sha256sum | cut -c1-16)
tarball=$cache/postgres-$key.tar
if [ -s "$tarball" ]; then echo "$tarball"; exit 0; fi

# What an earlier build left behind. It had a mount namespace of its own, so nothing can be mounted in there any more.
rm -rf --one-file-system "$cache"/making.*
work=$(mktemp -d "$cache/making.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM HUP

# createcluster.conf: the package would make a database of its own inside the image.
cat >"$work/before" <<'HOOK'
#!/bin/sh
set -e
mkdir -p "$1/etc/postgresql-common"
printf 'create_main_cluster = false\nstart_conf = manual\n' >"$1/etc/postgresql-common/createcluster.conf"
HOOK
cat >"$work/after" <<HOOK
#!/bin/sh
set -e
install -m 0755 "$here/pg-entry.sh" "\$1/usr/local/bin/pg-entry"
install -d "\$1/var/lib/postgresql/data"
# The programs themselves: the names in /usr/bin are a perl wrapper, too slow for a health check every second.
for program in "\$1"/usr/lib/postgresql/*/bin/*; do
    ln -s "\${program#"\$1"}" "\$1/usr/local/bin/\$(basename "\$program")"
done
rm -rf "\$1"/var/cache/* "\$1"/var/log/* "\$1"/var/lib/apt/lists "\$1"/boot "\$1"/etc/machine-id
mkdir -p "\$1/var/cache" "\$1/var/log"
HOOK
chmod +x "$work/before" "$work/after"

options=(--mode=root --variant=essential --format=tar --include="$package" --quiet
    --essential-hook="$work/before \"\$1\"" --customize-hook="$work/after \"\$1\"")
# What a server in a container never opens: a third of the size, and the image has to cross the wire.
for path in '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/lintian/*' \
    '/usr/lib/*/libLLVM*' '/usr/lib/postgresql/*/lib/llvmjit*' '/usr/lib/postgresql/*/lib/bitcode/*' '/usr/lib/llvm*'; do
    options+=(--dpkgopt="path-exclude=$path")
done
for name in Acquire::http::Proxy Acquire::https::Proxy; do
    value=$(apt-config shell v "$name" | sed -n "s/^v='\(.*\)'$/\1/p")
    [ -z "$value" ] || options+=(--aptopt="$name \"$value\"")
done
echo "$list" >"$work/sources.list"
# A timestamp that does not move: the same packages give the same image.
export SOURCE_DATE_EPOCH=1700000000
# Namespaces of its own: whoever ends this script ends all of it, and the mounts that mmdebstrap makes go with it.
if ! TMPDIR=$work unshare --mount --pid --fork --kill-child=SIGKILL --mount-proc -- mmdebstrap "${options[@]}" '' "$work/root.tar" - <"$work/sources.list" >"$work/log" 2>&1; then
    tail -20 "$work/log" >&2
    die "mmdebstrap could not make the database image; is the mirror in /etc/apt/sources.list reachable?"
fi
mv "$work/root.tar" "$tarball"
# Older tarballs of other recipes are of no use any more.
find "$cache" -maxdepth 1 -name 'postgres-*.tar' ! -path "$tarball" -delete
echo "$tarball"
