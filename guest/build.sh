#!/bin/bash
# Builds the guest: out/guest/{vmlinuz,vmlinux,initrd.cpio}. Does nothing when they are up to date.
# Needs Debian 12 or 13 with apt, dpkg, xz and the Rust toolchain; the network only for a kernel
# that is not in out/guest/cache yet.
set -euo pipefail
cd "$(dirname "$0")/.."

target=x86_64-unknown-linux-gnu
out=$PWD/out/guest
cache=$out/cache
mkdir -p "$cache"

# Two builds at once would unpack over each other.
exec 9>"$out/.lock"
flock 9

newest_cached() { find "$cache" -name 'linux-image-*.deb' -printf '%f\n' | sort -V | tail -1; }

# The metapackage names the kernel; the file name carries its version.
package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }' || true)
version=$(apt-cache show --no-all-versions "${package:-none}" 2>/dev/null | awk '$1 == "Version:" { print $2; exit }' || true)
deb=${package}_${version//:/%3a}_amd64.deb
if [[ -z $package || -z $version ]]; then
    deb=$(newest_cached)
    [[ -n $deb ]] || { echo "guest: apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
elif [[ ! -f $cache/$deb ]]; then
    echo "guest: downloading $deb"
    if ! (cd "$cache" && apt-get -qq -o APT::Sandbox::User=root download "$package=$version"); then
        deb=$(newest_cached)
        [[ -n $deb ]] || { echo "guest: cannot download $package: is the network up?" >&2; exit 1; }
        echo "guest: cannot download $package, using $deb" >&2
    fi
fi

sources=$(find guest/src guest/Cargo.toml guest/build.sh -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
stamp="$deb ${sources%% *}"
if [[ -s $out/vmlinuz && -s $out/initrd.cpio && $(cat "$out/stamp" 2>/dev/null) == "$stamp" ]]; then
    exit 0
fi
rm -f "$out/stamp" "$out/vmlinux"

# A target directory of its own: the flags would otherwise rebuild everything else.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet -p holdfast-guest --profile guest \
    --target "$target" --target-dir target/guest
built=target/guest/$target/guest

unpacked=$(mktemp -d "$out/unpack.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
dpkg -x "$cache/$deb" "$unpacked"
modules=$(find "$unpacked/lib/modules" "$unpacked/usr/lib/modules" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | head -1 || true)
[[ -n $modules ]] || { echo "guest: $deb holds no modules" >&2; exit 1; }
cp "$unpacked"/boot/vmlinuz-* "$out/vmlinuz"
"$built/guest-image" "$modules" "$built/holdfast-guest" "$out/vmlinuz" "$out"

find "$cache" -name '*.deb' ! -name "$deb" -delete
echo "$stamp" >"$out/stamp"
echo "guest: built from $deb"
ls -l "$out"/vmlinu? "$out"/vmlinux "$out"/initrd.cpio 2>/dev/null | awk '{ print "  " $5 "\t" $NF }' | sort -u
