#!/usr/bin/env bash
# Make sure that Tesseract 5 or newer with English data is on the PATH: install it where the system's package
# manager may be used, otherwise say in one line what to install.
set -u

ready() {
  local version
  version=$(tesseract --version 2>&1 | sed -n '1s/^tesseract v\{0,1\}\([0-9]*\).*/\1/p')
  [ "${version:-0}" -ge 5 ] && tesseract --list-langs 2>&1 | grep -qx eng
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  else
    command -v sudo >/dev/null && sudo -n "$@"
  fi
}

ready && exit 0
if command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  echo "installing Tesseract with apt-get"
  as_root apt-get -qq update >/dev/null 2>&1 </dev/null &&
    as_root apt-get -qq install -y tesseract-ocr tesseract-ocr-eng >/dev/null 2>&1 </dev/null
fi
ready && exit 0
echo "Tesseract 5 or newer with English data is missing: install it (Debian and Ubuntu: tesseract-ocr; Fedora," \
  "Homebrew and conda-forge: tesseract) and run this again" >&2
exit 1
