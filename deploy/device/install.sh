#!/usr/bin/env bash
# Install a package of slmops on this device: install.sh PACKAGE [--prefix DIR] [--from SLMOPS] [--no-service] | --rollback [--prefix DIR]
#
# DIR (/opt/slmops) gets `venv` (slmops[runtime] and nothing more), `package` and `host.py`. SLMOPS is what pip installs
# slmops from: a wheel or a checkout (default: the checkout that this script lies in).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
prefix=/opt/slmops from="$(cd "$here/../.." && pwd)" package="" service=yes rollback=no
while [ $# -gt 0 ]; do
  case "$1" in
    --prefix) prefix="$2"; shift 2 ;;
    --from) from="$2"; shift 2 ;;
    --no-service) service=no; shift ;;
    --rollback) rollback=yes; shift ;;
    -*) echo "install.sh: no such option: $1" >&2; exit 2 ;;
    *) package="$1"; shift ;;
  esac
done

restart() {
  if [ "$service" = yes ]; then systemctl restart slmops-package.service; fi
}

if [ "$rollback" = yes ]; then
  [ -d "$prefix/package.previous" ] || { echo "install.sh: $prefix has no previous package" >&2; exit 4; }
  mv "$prefix/package" "$prefix/package.rolled-back"
  mv "$prefix/package.previous" "$prefix/package"
  rm -rf "$prefix/package.rolled-back"
  restart
  exit 0
fi
[ -f "$package/slmops.json" ] || { echo "install.sh: $package is not a package of slmops (no slmops.json)" >&2; exit 4; }

mkdir -p "$prefix"
if [ ! -x "$prefix/venv/bin/slmops" ]; then
  python3 -m venv "$prefix/venv"
  constraints=(); [ -f "$from/constraints.txt" ] && constraints=(-c "$from/constraints.txt")
  "$prefix/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${constraints[@]}" "${from}[runtime]"
fi
cp "$here/host.py" "$prefix/host.py"

# Tested where it will lie, and by what will run it, before it takes the old one's place.
rm -rf "$prefix/package.new"
cp -R "$package" "$prefix/package.new"
"$prefix/venv/bin/slmops" verify "$prefix/package.new" --self-test --quiet
if [ -d "$prefix/package" ]; then
  rm -rf "$prefix/package.previous"
  mv "$prefix/package" "$prefix/package.previous"
fi
mv "$prefix/package.new" "$prefix/package"

if [ "$service" = yes ]; then
  id slmops >/dev/null 2>&1 || useradd --system --no-create-home --shell /usr/sbin/nologin slmops
  sed "s#/opt/slmops#$prefix#g" "$here/slmops-package.service" > /etc/systemd/system/slmops-package.service
  systemctl daemon-reload
  systemctl enable slmops-package.service
  restart
fi
