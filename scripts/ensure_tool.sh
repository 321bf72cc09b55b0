#!/usr/bin/env bash
# Make sure that a program which pip does not install is here: install it where the system's package manager may be
# used, otherwise say in one line what to install.
#   scripts/ensure_tool.sh tesseract   Tesseract 5 or newer with English data, which reads the pictures
#   scripts/ensure_tool.sh chromium    Chromium or Chrome, which the browser tests drive; CHROMIUM names another path
set -u

case "${1-}" in
  tesseract)
    packages=(tesseract-ocr tesseract-ocr-eng)
    missing="Tesseract 5 or newer with English data is missing: install it (Debian and Ubuntu: tesseract-ocr; Fedora, \
Homebrew and conda-forge: tesseract) and run this again"
    ready() {
      local version
      version=$(tesseract --version 2>&1 | sed -n '1s/^tesseract v\{0,1\}\([0-9]*\).*/\1/p')
      [ "${version:-0}" -ge 5 ] && tesseract --list-langs 2>&1 | grep -qx eng
    }
    ;;
  chromium)
    packages=(chromium)
    missing="Chromium is missing, which the browser tests need: install it (Debian and Fedora: chromium; elsewhere Chrome \
will do) or name it in CHROMIUM, and run this again"
    ready() {
      local name
      for name in "${CHROMIUM:-chromium}" chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null && return 0
      done
      return 1
    }
    ;;
  *)
    echo "usage: $0 tesseract|chromium" >&2
    exit 2
    ;;
esac

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
  echo "installing ${packages[0]} with apt-get"
  as_root apt-get -qq update >/dev/null 2>&1 </dev/null &&
    as_root apt-get -qq install -y "${packages[@]}" >/dev/null 2>&1 </dev/null
fi
ready && exit 0
echo "$missing" >&2
exit 1
