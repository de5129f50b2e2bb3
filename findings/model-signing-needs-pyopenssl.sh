#!/usr/bin/env bash
# model-signing 1.1.1: signing with a key cannot be imported after a plain installation.
#
# Expected: after `pip install model-signing`, `import model_signing.signing` works, as the package's own guide begins.
# Seen: ModuleNotFoundError: No module named 'OpenSSL'. The package imports pyOpenSSL, and neither it nor what it depends
#   on declares that, so `pip check` finds nothing wrong; `pip install pyOpenSSL` mends it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet model-signing==1.1.1 sigstore==4.5.1
cd "$work"
"$work/env/bin/pip" check
before=$("$work/env/bin/python" -c "import model_signing.signing" 2>&1 | tail -n 1 || true)
"$work/env/bin/pip" install --quiet pyOpenSSL
after=$("$work/env/bin/python" -c "import model_signing.signing; print('imports')" 2>&1 | tail -n 1 || true)
echo "model-signing 1.1.1, sigstore 4.5.1: $before"
echo "with pyOpenSSL: $after"
[ "$before" = "ModuleNotFoundError: No module named 'OpenSSL'" ] && [ "$after" = imports ] || {
  echo "the behavior changed"
  exit 1
}
