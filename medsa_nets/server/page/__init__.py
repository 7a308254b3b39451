"""The server's page: its files, and NiiVue, which is fetched once, when the package is built or installed.

``python -m medsa_nets.server.page`` fetches it by npm; a wheel that is built afterwards carries it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from medsa_nets.data.atomic import temporary_name
from medsa_nets.errors import DataError, MedSAError

FOLDER = Path(__file__).parent
NIIVUE = "@niivue/niivue@0.69.0"  # BSD-2-Clause
NIIVUE_MEMBER = "package/dist/niivue.umd.js"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
NIIVUE_FILE = "niivue.umd.js"
TYPES = {"index.html": "text/html", "style.css": "text/css", "annotate.js": "text/javascript",
         NIIVUE_FILE: "text/javascript"}  # fmt: skip
# Nothing from elsewhere; NiiVue has fonts and matcaps as data in it.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def read_file(name: str) -> bytes | None:
    """A file of the page; none where there is no such file."""
    path = FOLDER / name
    return path.read_bytes() if name in TYPES and path.is_file() else None


def fetch_niivue(target: Path = FOLDER / NIIVUE_FILE) -> Path:
    """Fetch NiiVue from the npm registry, unless it is there.

    Args:
        target: where it goes.

    Raises:
        DataError: when npm is absent or fails, or what came is something else.
    """
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == NIIVUE_SHA256:
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm is not installed, which fetches {NIIVUE} for the server's page. Install Node.js.")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", "--silent", NIIVUE], cwd=folder, capture_output=True, text=True)
        packed = sorted(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            raise DataError(f"npm pack {NIIVUE} failed: {done.stderr.strip()[-300:]}")
        with tarfile.open(packed[0]) as archive:
            member = archive.extractfile(NIIVUE_MEMBER)
            content = b"" if member is None else member.read()
    if hashlib.sha256(content).hexdigest() != NIIVUE_SHA256:
        raise DataError(f"{NIIVUE}: {NIIVUE_MEMBER} is not the file that this page was written for (SHA-256).")
    with temporary_name(target) as part:
        part.write_bytes(content)
    return target


def main() -> int:
    """Command line."""
    try:
        print(fetch_niivue())
    except MedSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
